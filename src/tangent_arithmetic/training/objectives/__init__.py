"""Training objectives, one a file."""

from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective
from tangent_arithmetic.training.objectives.cross_entropy import CrossEntropy

__all__ = ["OBJECTIVES", "CrossEntropy", "Objective"]
