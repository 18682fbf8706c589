"""Scaling coefficients: which are tried, and which of them is chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from tangent_arithmetic.runtime import ddp

logger = logging.getLogger(__name__)

FEW = 100  # images of a split below which one of them is more than a percent


def coefficients(num_points: int) -> list[float]:
    """`num_points` coefficients from 0 to 1, evenly spaced, as short decimals."""
    return [round(float(c), 10) for c in np.linspace(0.0, 1.0, num_points)]


def find_optimal_coef(
    results: Mapping[str, Mapping[str, float]] | Mapping[float, Mapping[str, float]],
    metric: str = "avg_normalized_top1",
    minimize: bool = False,
    control_metric: str | None = None,
    control_metric_threshold: float = 0.0,
    num_images: int | None = None,
) -> float:
    """The coefficient with the best metric among those that keep the control metric.

    Ties go to the smallest coefficient; a warning says so where it is 0 or the split is tiny, see
    `warn_of_ties`. If none qualifies the answer is 0, the pre-trained model, and a warning says so.

    Args:
        results: coefficient -> metrics; keys may be numbers or their texts.
        metric: what to optimise.
        minimize: whether lower is better.
        control_metric: metric that must reach the threshold; None for no condition.
        control_metric_threshold: least value of the control metric.
        num_images: pictures of the smallest split that the metrics are of, if that is known.
    """
    best = best_coefs(results, metric, minimize, control_metric, control_metric_threshold)
    if not best:
        logger.warning(
            "no coefficient keeps %s at %.4f or more; taking 0, the pre-trained model",
            control_metric,
            control_metric_threshold,
        )
        return 0.0
    warn_of_ties([best], num_images, metric)
    return best[0]


def best_coefs(
    results: Mapping[str, Mapping[str, float]] | Mapping[float, Mapping[str, float]],
    metric: str,
    minimize: bool = False,
    control_metric: str | None = None,
    control_metric_threshold: float = 0.0,
) -> list[float]:
    """All coefficients with the best metric, in order; arguments as `find_optimal_coef`."""
    sign = 1.0 if minimize else -1.0
    qualified = [
        (sign * found[metric], float(coef))
        for coef, found in results.items()
        if control_metric is None or found[control_metric] >= control_metric_threshold
    ]
    best = min(qualified, default=(0.0, 0.0))[0]
    return sorted(coef for value, coef in qualified if value == best)


def warn_of_ties(chosen: Sequence[Sequence[float]], num_images: int | None, what: str) -> None:
    """Warns, once, of coefficients that were the smallest of several equally good ones.

    That is worth knowing where it is 0, which is no edit at all, or where the split is so small
    that many coefficients must tie.

    Args:
        chosen: for each choice the coefficients with the best value, see `best_coefs`.
        num_images: pictures of the smallest split that they were chosen on, if that is known.
        what: what was chosen by, for the message.
    """
    tiny = num_images is not None and num_images < FEW
    ties = [tied for tied in chosen if len(tied) > 1 and (tied[0] == 0 or tiny)]
    if not ties or not ddp.is_main_process():
        return
    size = "" if num_images is None else f" on {num_images} pictures"
    if len(chosen) == 1:
        model = ", the pre-trained model" if ties[0][0] == 0 else ""
        logger.warning(
            "%s: %d coefficients, %g to %g, tie for the best value%s; taking the smallest, %g%s",
            what, len(ties[0]), ties[0][0], ties[0][-1], size, ties[0][0], model,
        )  # fmt: skip
        return
    logger.warning(
        "%s: in %d of %d choices several coefficients tie for the best value%s; the smallest is "
        "taken, in %d of them 0, the pre-trained model",
        what, len(ties), len(chosen), size, sum(tied[0] == 0 for tied in ties),
    )  # fmt: skip
