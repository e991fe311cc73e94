"""Data sets, where their files come from, and how their samples are dealt out to clients."""
