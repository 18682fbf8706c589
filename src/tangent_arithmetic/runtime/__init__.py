"""Processes, signals, logs, errors, atomic writes."""
