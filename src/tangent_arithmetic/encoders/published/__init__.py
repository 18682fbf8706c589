"""Checkpoints of other projects, read without executing anything that they contain."""
