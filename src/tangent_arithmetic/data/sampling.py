"""Samples of a split."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def stratified(labels: Array, count: int) -> Array:
    """Indices, in order, of `count` images that hold each class by its share.

    The first images of each class are taken; what the shares leave of a whole number goes to the
    classes with the largest remainders, and among equals to the first.

    Args:
        labels: int64 (images,).
        count: how many; all if there are not more.
    """
    labels = np.asarray(labels)
    if count >= len(labels):
        return np.arange(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count / len(labels)
    whole = np.floor(shares).astype(int)
    order = np.argsort(whole - shares, kind="stable")  # the largest remainder first
    whole[order[: count - whole.sum()]] += 1
    chosen = [np.flatnonzero(labels == k)[:n] for k, n in zip(classes, whole, strict=True)]
    return np.sort(np.concatenate(chosen))
