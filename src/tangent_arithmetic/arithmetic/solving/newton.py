r"""Newton's method for a convex function of a few numbers, with backtracking.

\[ a \leftarrow a - t\, H^{-1} g, \quad t = 1, \tfrac14, \tfrac1{16}, ... \]

until the function falls.

Where the Hessian is singular, as for a direction that changes nothing, a small number on its
diagonal keeps the step finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64

STEPS = 500  # at most
SHORTER = 20  # times that a step is shortened
ARMIJO = 1e-4  # share of the fall that a gradient predicts, which a step must reach
JITTER, TINY = 1e-10, 1e-30  # relative and absolute, on the diagonal of a Hessian


def newton(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    hessian: Callable[[np.ndarray], np.ndarray],
    start: Float64[np.ndarray, " directions"],
    precision: float,
) -> tuple[Float64[np.ndarray, " directions"], Float64[np.ndarray, " directions"]]:
    """The minimum of a convex function by Newton's method, with steps that are shortened to fall.

    Args:
        function: the value and the gradient.
        hessian: the Hessian, or one near it; semi-definite.
        start: where to start.
        precision: norm of the gradient at which to stop; rounding may stop it before.

    Returns:
        The point and the gradient there.
    """
    a = np.asarray(start, dtype=np.float64)
    value, gradient = function(a)
    for _ in range(STEPS):
        if np.linalg.norm(gradient) < precision:
            break
        curved = hessian(a)
        curved[np.diag_indices_from(curved)] += JITTER * curved.trace() + TINY
        step = -np.linalg.solve(curved, gradient)
        for _ in range(SHORTER):
            ahead, slope = function(a + step)
            if ahead < value + ARMIJO * float(gradient @ step):
                break
            step = step / 4
        else:
            break
        a, value, gradient = a + step, ahead, slope
    return a, gradient
