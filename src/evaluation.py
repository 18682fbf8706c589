"""Evaluation on artificial data. See `artificial_data.evaluation` of the package."""

from tangent_arithmetic.artificial_data.evaluation import eval_single_dataset, get_head

__all__ = ["eval_single_dataset", "get_head"]
