"""Training objectives, an objective a file."""

from tangent_arithmetic.training.objectives import ascent, delta, orthoreg, tak, taujp  # noqa: F401 - registered
from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Penalised, Setting
from tangent_arithmetic.training.objectives.supervised import (
    BinaryCrossEntropy,
    CrossEntropy,
    intercepts,
    supervised_of,
)

__all__ = [
    "OBJECTIVES",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Objective",
    "Penalised",
    "Setting",
    "intercepts",
    "supervised_of",
]
