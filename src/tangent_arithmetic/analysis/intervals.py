"""Intervals of what is measured on a sample of images.

The spread over seeds of fine-tuning is another thing, and stated apart, see `seeds`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 2000


def binomial_error(accuracy: float, images: int) -> float:
    """The standard error of an accuracy on images; an upper bound for a mean over the same.

    Half the length of Wilson's interval at one standard error: sqrt(a (1 - a) / n) for many images
    and accuracies inside, but not 0 where all or none are right.
    """
    variance = accuracy * (1 - accuracy) / images + 1 / (4 * images**2)
    return float(np.sqrt(variance) / (1 + 1 / images))


def largest_error(*images: int) -> float:
    """The largest binomial standard error of a sum of shares, each on so many images of its own."""
    return float(np.sqrt(sum(1 / (4 * count) for count in images)))


def bootstrap(parts: Sequence[Floats], seed: int = 0) -> tuple[float, float]:
    """The interval of a sum of means, resampling the images of each part; percentiles.

    Args:
        parts: values of the images of each part.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    totals = np.zeros(RESAMPLES)
    for part in parts:
        totals += part[rng.integers(len(part), size=(RESAMPLES, len(part)))].mean(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(totals, [tail, 1 - tail])
    return float(low), float(high)
