"""How fast this machine is, and how near to that a round comes."""
