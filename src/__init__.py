"""Tangent Arithmetic: task vectors, linearised fine-tuning and the evaluation of both."""

__version__ = "0.1.0"
