"""Task vectors and their arithmetic. See `arithmetic.task_vectors`."""

from tangent_arithmetic.arithmetic.task_vectors import (
    LinearizedTaskVector,
    NonLinearTaskVector,
    TaskVector,
    linear_to_nonlinear,
    nonlinear_to_linear,
)

__all__ = [
    "LinearizedTaskVector",
    "NonLinearTaskVector",
    "TaskVector",
    "linear_to_nonlinear",
    "nonlinear_to_linear",
]
