"""What the papers analyse: figures so far."""
