"""Samples of a split."""

from __future__ import annotations

import numpy as np


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of a stratified sample: the first images of each class, by its share.

    Fractions are rounded by largest remainder; ties go to the lower label.

    Args:
        labels: int64 (images,).
        count: size of the sample; all images if there are no more.
    """
    labels = np.asarray(labels)
    if count >= len(labels):
        return np.arange(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * count / len(labels)
    whole = np.floor(shares).astype(int)
    order = np.argsort(whole - shares, kind="stable")  # largest remainder first
    whole[order[: count - whole.sum()]] += 1
    chosen = [np.flatnonzero(labels == k)[:n] for k, n in zip(classes, whole, strict=True)]
    return np.sort(np.concatenate(chosen))
