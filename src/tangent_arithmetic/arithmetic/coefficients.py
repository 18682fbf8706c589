"""Scaling coefficients: the grid to try, and the choice of the best one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from tangent_arithmetic.runtime import ddp

logger = logging.getLogger(__name__)

ROUNDING = 1e-9
FEW = 100  # images of a split below which one of them is more than a percent


def coefficients(num_points: int) -> list[float]:
    """`num_points` coefficients from 0 to 1, evenly spaced, as short decimals."""
    return [round(float(c), 10) for c in np.linspace(0.0, 1.0, num_points)]


def least_kept(share: float, accuracy: float) -> float:
    """The lowest accuracy that keeps a share of another; rounding errors do not decide."""
    return share * accuracy - ROUNDING


def find_optimal_coef(
    results: Mapping[str, Mapping[str, float]] | Mapping[float, Mapping[str, float]],
    metric: str = "avg_normalized_top1",
    minimize: bool = False,
    control_metric: str | None = None,
    control_metric_threshold: float = 0.0,
    num_images: int | None = None,
) -> float:
    """The coefficient with the best metric among those that meet the condition on the control.

    Ties go to the smallest coefficient, see `warn_of_ties`. If no coefficient qualifies, it is 0,
    the pre-trained model, with a warning.

    Args:
        results: coefficient -> metrics; keys may be numbers or strings.
        metric: the metric to optimise.
        minimize: whether lower is better.
        control_metric: metric that must reach the threshold; None for no condition.
        control_metric_threshold: lowest acceptable value of the control metric.
        num_images: size of the smallest split behind the metrics, if known.
    """
    sign = -1.0 if minimize else 1.0
    best = largest(
        {
            float(coef): sign * metrics[metric]
            for coef, metrics in results.items()
            if control_metric is None or metrics[control_metric] >= control_metric_threshold
        }
    )
    if not best:
        logger.warning(
            "no coefficient keeps %s at %.4f or more; taking 0, the pre-trained model",
            control_metric,
            control_metric_threshold,
        )
        return 0.0
    warn_of_ties([best], num_images, metric)
    return best[0]


def largest(values: Mapping[float, float]) -> list[float]:
    """All coefficients with the largest value, in order."""
    best = max(values.values(), default=0.0)
    return sorted(coef for coef, value in values.items() if value == best)


def warn_of_ties(chosen: Sequence[Sequence[float]], num_images: int | None, what: str) -> None:
    """Warns, once, if choices between equally good coefficients may be arbitrary.

    They may be if the choice is 0, the pre-trained model, or if the split is so small that many
    coefficients must tie.

    Args:
        chosen: for each choice the coefficients with the best value, see `largest`.
        num_images: size of the smallest split behind the choices, if known.
        what: the criterion of the choices, for the message.
    """
    tiny = num_images is not None and num_images < FEW
    ties = [tied for tied in chosen if len(tied) > 1 and (tied[0] == 0 or tiny)]
    if not ties or not ddp.is_main_process():
        return
    size = "" if num_images is None else f" on {num_images} images"
    if len(chosen) == 1:
        (tied,) = ties
        model = ", the pre-trained model" if tied[0] == 0 else ""
        message = (
            f"{len(tied)} coefficients, {tied[0]:g} to {tied[-1]:g}, tie for the best value{size}; "
            f"taking the smallest, {tied[0]:g}{model}"
        )
    else:
        zeros = sum(tied[0] == 0 for tied in ties)
        message = (
            f"in {len(ties)} of {len(chosen)} choices several coefficients tie for the best value"
            f"{size}; taking the smallest, in {zeros} of them 0, the pre-trained model"
        )
    logger.warning("%s: %s", what, message)
