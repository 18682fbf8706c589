"""A few labelled images a class."""

from __future__ import annotations

from dataclasses import replace

from numpy.typing import ArrayLike

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.sampling import few_of_each
from tangent_arithmetic.runtime.errors import UsageError

ORDER = 29  # in the seed of the images' order


def few(split: Split, shots: int | None, seed: int) -> Split:
    """The split with `shots` images of each class; all of its images if None.

    Raises:
        UsageError: if its batches have no list of images to choose from.
    """
    if shots is None:
        return split
    if not isinstance(split.batches, EvalBatches):
        raise UsageError(f"expected EvalBatches to choose shots from, got {type(split.batches)}")
    pictures = split.batches.pictures
    indices = shot_indices(labels_of(pictures), shots, seed)
    batches = replace(split.batches, pictures=SubsetPictures(pictures, indices))
    return replace(split, batches=batches, whole=split.whole or len(pictures))


def shot_indices(labels: ArrayLike, shots: int, seed: int) -> list[int]:
    """Sorted indices of `shots` images of each class, see `few_of_each`."""
    return few_of_each(labels, shots, (seed, ORDER))
