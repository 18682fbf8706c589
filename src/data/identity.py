"""What a split holds, as a hash.

`fingerprint` notices every change, so that whatever is computed from the pictures can be kept under
it; `split_hash` is the same on every machine, so that a split can be recognised.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.data.base import ArrayPictures, Pictures, SubsetPictures
from src.data.clip8.folders import LazyPictures

Samples = Sequence[tuple[str | Path, Any]]


def fingerprint(pictures: Pictures) -> str | None:
    """A hash of a split's pictures, labels and their order.

    Pictures in memory count by content; files count by path, size and time of their last change,
    so that a picture that is replaced on disk is noticed without reading any.

    Returns:
        64 hexadecimal digits; None for a data set whose pictures cannot be told apart so.
    """
    return _digest(pictures, lambda samples: [_file(path) for path, _ in samples])


def split_hash(pictures: Pictures) -> str | None:
    """A hash of which pictures a split has, in which order, and their labels.

    It is the same wherever the data lie: files count by their path below the folder that holds all
    of them, whatever their content; pictures in memory count by content. Two splits that were drawn
    from the same files in another order differ.

    Returns:
        64 hexadecimal digits; None as for `fingerprint`.
    """
    return _digest(pictures, _names)


def _digest(pictures: Pictures, ids: Callable[[Samples], list[str]]) -> str | None:
    if isinstance(pictures, ArrayPictures):
        return _hash(_bytes(pictures.images), _bytes(pictures.labels))
    if isinstance(pictures, SubsetPictures):
        inner = _digest(pictures.pictures, ids)
        return inner and _hash(inner.encode(), _bytes(np.asarray(pictures.indices)))
    if isinstance(pictures, LazyPictures):
        return _digest(pictures.listing, ids)
    samples = getattr(pictures, "samples", None) or getattr(pictures, "_samples", None)
    if samples is not None:  # torchvision's data sets of files
        found = zip(ids(samples), samples, strict=True)
        return _hash(*(f"{name}|{label}".encode() for name, (_, label) in found))
    data = getattr(pictures, "data", None)
    labels = getattr(pictures, "targets", getattr(pictures, "labels", None))
    if data is None or labels is None:
        return None
    return _hash(_bytes(np.asarray(data)), _bytes(np.asarray(labels)))  # torchvision's arrays


def _names(samples: Samples) -> list[str]:
    """The paths below the folder that holds all of them, with slashes."""
    paths = [os.fspath(path) for path, _ in samples]
    above = os.path.commonpath(paths) if len(paths) > 1 else str(Path(paths[0]).parent)
    return [os.path.relpath(path, above).replace(os.sep, "/") for path in paths]


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
