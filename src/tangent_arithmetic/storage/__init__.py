"""State dicts and checkpoints on disk."""
