"""Samples of a split."""

from __future__ import annotations

import numpy as np


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
