"""Limits of this machine, and how near to them a round comes."""
