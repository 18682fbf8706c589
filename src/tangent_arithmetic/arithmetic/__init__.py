"""Arithmetic on task vectors, and its evaluation."""
