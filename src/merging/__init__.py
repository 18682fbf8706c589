"""Model merging: methods by name, streamed from files to files. See docs/merging.md."""

from src.merging import dare, dummy, simple_average, slerp, task_arithmetic, ties, weighted_average
from src.merging.algorithms import (
    Algorithm,
    DareTaskArithmetic,
    DareTiesMerging,
    DummyAlgorithm,
    SimpleAverageAlgorithm,
    SlerpMergeAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    WeightedAverageAlgorithm,
)
from src.merging.pool import CLIPVisionModelPool, ModelPool, run_pool
from src.merging.registry import METHODS, Piece, get_method, merging_method
from src.merging.saving import save_merged, written_recipe

__all__ = [
    "METHODS", "Algorithm", "CLIPVisionModelPool", "DareTaskArithmetic", "DareTiesMerging",
    "DummyAlgorithm", "ModelPool", "Piece", "SimpleAverageAlgorithm", "SlerpMergeAlgorithm",
    "TaskArithmeticAlgorithm", "TiesMergingAlgorithm", "WeightedAverageAlgorithm", "dare", "dummy",
    "get_method", "merging_method", "run_pool", "save_merged", "simple_average", "slerp",
    "task_arithmetic", "ties", "weighted_average", "written_recipe",
]  # fmt: skip
