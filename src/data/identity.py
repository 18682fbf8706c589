"""What a split holds, as a hash: whatever is computed from its pictures can be kept under it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from src.data.base import ArrayPictures, Pictures, SubsetPictures
from src.data.clip8.folders import LazyPictures


def fingerprint(pictures: Pictures) -> str | None:
    """A hash of a split's pictures, labels and their order.

    Pictures in memory count by content; files count by path, size and time of their last change,
    so that a picture that is replaced on disk is noticed without reading any.

    Returns:
        64 hexadecimal digits; None for a data set whose pictures cannot be told apart so.
    """
    if isinstance(pictures, ArrayPictures):
        return _hash(_bytes(pictures.images), _bytes(pictures.labels))
    if isinstance(pictures, SubsetPictures):
        inner = fingerprint(pictures.pictures)
        return inner and _hash(inner.encode(), _bytes(np.asarray(pictures.indices)))
    if isinstance(pictures, LazyPictures):
        return fingerprint(pictures.listing)
    samples = getattr(pictures, "samples", None) or getattr(pictures, "_samples", None)
    if samples is not None:  # torchvision's data sets of files
        return _hash(*(f"{_file(path)}|{label}".encode() for path, label in samples))
    data = getattr(pictures, "data", None)
    labels = getattr(pictures, "targets", getattr(pictures, "labels", None))
    if data is None or labels is None:
        return None
    return _hash(_bytes(np.asarray(data)), _bytes(np.asarray(labels)))  # torchvision's arrays


def _file(path: str | Path) -> str:
    facts = Path(path).stat()
    return f"{path}|{facts.st_size}|{facts.st_mtime_ns}"


def _bytes(array: Any) -> bytes:
    return f"{array.dtype}|{array.shape}|".encode() + np.ascontiguousarray(array).tobytes()


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
