"""Encoders, classification heads, and checkpoints of all origins."""
