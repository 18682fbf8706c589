"""The tests mirror `src`."""
