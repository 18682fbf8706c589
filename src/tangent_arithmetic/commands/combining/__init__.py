"""The parts of the command `combine`."""
