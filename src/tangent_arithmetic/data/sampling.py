"""Samples of a split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of a stratified sample: the first images of each class, by its share.

    Fractions are rounded by largest remainder; ties go to the lower label.

    With several labels an image it is a systematic sample in the order of the sets of labels: each
    set has its share, up to one image.

    Args:
        labels: int64 (images,), or zeros and ones (images, classes).
        count: size of the sample; all images if there are no more.
    """
    labels = np.asarray(labels)
    if count >= len(labels):
        return np.arange(len(labels))
    if labels.ndim == 2:
        order = np.lexsort(labels.T[::-1])  # stable; the first class decides first
        return np.sort(order[(2 * np.arange(count) + 1) * len(labels) // (2 * count)])
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count / len(labels)
    whole = np.floor(shares).astype(int)
    order = np.argsort(whole - shares, kind="stable")  # largest remainder first
    whole[order[: count - whole.sum()]] += 1
    chosen = [np.flatnonzero(labels == k)[:n] for k, n in zip(classes, whole, strict=True)]
    return np.sort(np.concatenate(chosen))


def few_of_each(labels: ArrayLike, shots: int, entropy: Sequence[int]) -> list[int]:
    """Sorted indices of `shots` images of each class, of all images of a smaller one.

    More shots include those of fewer. An image with several labels counts for each of them.

    Args:
        labels: (images,), or zeros and ones (images, classes).
        shots: images a class.
        entropy: seeds the order in which images are taken.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(entropy).permutation(len(labels))
    has = labels if labels.ndim == 2 else labels[:, None] == np.unique(labels)
    chosen = [order[column[order].astype(bool)][:shots] for column in has.T]
    indices: list[int] = np.unique(np.concatenate(chosen)).tolist()
    return indices
