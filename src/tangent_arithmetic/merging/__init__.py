"""Model merging: methods by name, streamed from files to files. See docs/merging.md."""

from tangent_arithmetic.merging import (
    dare,
    dummy,
    simple_average,
    slerp,
    task_arithmetic,
    ties,
    weighted_average,
)
from tangent_arithmetic.merging.algorithms import (
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
from tangent_arithmetic.merging.pool import CLIPVisionModelPool, ModelPool, run_pool
from tangent_arithmetic.merging.registry import METHODS, Piece, get_method, merging_method
from tangent_arithmetic.merging.saving import save_merged, written_recipe

__all__ = [
    "METHODS", "Algorithm", "CLIPVisionModelPool", "DareTaskArithmetic", "DareTiesMerging",
    "DummyAlgorithm", "ModelPool", "Piece", "SimpleAverageAlgorithm", "SlerpMergeAlgorithm",
    "TaskArithmeticAlgorithm", "TiesMergingAlgorithm", "WeightedAverageAlgorithm", "dare", "dummy",
    "get_method", "merging_method", "run_pool", "save_merged", "simple_average", "slerp",
    "task_arithmetic", "ties", "weighted_average", "written_recipe",
]  # fmt: skip
