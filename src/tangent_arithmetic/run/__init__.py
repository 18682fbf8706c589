"""A run: its flags, files and results."""
