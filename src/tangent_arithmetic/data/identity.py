"""What a split holds, as hashes.

`fingerprint` changes with every picture: what is computed from them is kept under it. `split_hash`
says which pictures a split has, the same on every machine: results and checkpoints carry it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tangent_arithmetic.data.base import ArrayPictures, Pictures, SubsetPictures
from tangent_arithmetic.data.clip8.folders import LazyPictures
from tangent_arithmetic.data.hub import HubPictures

SAMPLED = 64  # pictures of a split whose content is looked at


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
    if isinstance(pictures, HubPictures):
        return _hash(pictures.identity.encode())
    if (samples := samples_of(pictures)) is not None:
        return _hash(*(_text(f"{_file(path)}|{label}") for path, label in samples))
    if (arrays := _arrays(pictures)) is not None:
        return _hash(*(_bytes(np.asarray(array)) for array in arrays))
    return None


def split_ids(pictures: Pictures) -> list[str] | None:
    """Which pictures of its data set a split holds, whatever the folder that the set is in.

    A file is known by its path below the folder that all of the set's files share, a picture in an
    array by its index, a row of the hub by its index there. Unlike `fingerprint`, this says nothing
    of what is in them.

    Returns:
        One id a picture, in order; None where they have none.
    """
    if isinstance(pictures, SubsetPictures):
        inner = split_ids(pictures.pictures)
        return inner and [inner[int(index)] for index in pictures.indices]
    if isinstance(pictures, HubPictures):
        return [f"hub/{index}" for index in range(len(pictures))]
    if (samples := samples_of(pictures)) is not None:
        return _below([str(path) for path, _ in samples])
    if isinstance(pictures, ArrayPictures) or _arrays(pictures) is not None:
        return [str(index) for index in range(len(pictures))]
    return None


def pictures_hash(pictures: Pictures) -> str:
    """A hash of what a split's pictures hold, whatever the folder that they are in.

    Pictures in memory count by content; files by their path in the set, label and size, and
    `SAMPLED` of them, evenly spaced, by content; of pictures of any other kind so many are decoded.

    Args:
        pictures: the split.

    Returns:
        64 hexadecimal digits.
    """
    spread = range(0, len(pictures), max(1, len(pictures) // SAMPLED))
    files = _files(pictures)
    if files is None:
        if (known := fingerprint(pictures)) is not None:
            return known
        drawn = (pictures[index] for index in spread)
        return _hash(*(_bytes(np.asarray(image)) + f"|{label}".encode() for image, label in drawn))
    parts = []
    for name, (path, label) in zip(_below([str(p) for p, _ in files]), files, strict=True):
        parts.append(_text(f"{name}|{label}|{Path(path).stat().st_size}"))
    return _hash(*parts, *(Path(files[index][0]).read_bytes() for index in spread))


def times_hash(pictures: Pictures) -> str | None:
    """A hash of when each file of a split was last changed; None where pictures are no files.

    Beside `pictures_hash` it notices a single picture that is replaced by one of the same size, but
    takes a copy of the files for others.
    """
    files = _files(pictures)
    if files is None:
        return None
    return _hash(*(str(Path(path).stat().st_mtime_ns).encode() for path, _ in files))


def _files(pictures: Pictures) -> Sequence[tuple[str | Path, int]] | None:
    """Path and label of each picture of a split that consists of files."""
    if isinstance(pictures, SubsetPictures):
        inner = _files(pictures.pictures)
        return inner and [inner[int(index)] for index in pictures.indices]
    return samples_of(pictures)


def labels_of(pictures: Pictures) -> np.ndarray:
    """The label of every picture, int64; a picture is decoded only where nothing else tells."""
    if isinstance(pictures, SubsetPictures):
        return labels_of(pictures.pictures)[np.asarray(pictures.indices, dtype=np.int64)]
    if isinstance(pictures, HubPictures):
        return np.asarray(pictures.labels)[np.asarray(pictures.rows[pictures.label])]
    if (samples := samples_of(pictures)) is not None:
        return np.array([label for _, label in samples], dtype=np.int64)
    if (found := getattr(pictures, "targets", getattr(pictures, "labels", None))) is not None:
        return np.asarray(found, dtype=np.int64)
    return np.array([pictures[i][1] for i in range(len(pictures))], dtype=np.int64)


def split_hash(pictures: Pictures) -> str | None:
    """A hash of `split_ids`: equal for the same pictures in the same order."""
    ids = split_ids(pictures)
    return None if ids is None else _hash(_text("\n".join(ids)))


def _below(paths: list[str]) -> list[str]:
    """The paths below the folder that all of them share."""
    if not paths:
        return []
    paths = [path.replace(os.sep, "/") for path in paths]
    ends = min(paths), max(paths)  # what these two share, all share
    shared = posixpath.commonpath([posixpath.dirname(end) for end in ends])
    return [path[len(shared) :].lstrip("/") for path in paths]


def samples_of(pictures: Pictures) -> Sequence[tuple[str | Path, int]] | None:
    """Path and label of each picture of torchvision's data sets of files, and of our lists."""
    if isinstance(pictures, LazyPictures):
        pictures = pictures.listing
    return getattr(pictures, "samples", None) or getattr(pictures, "_samples", None)


def _arrays(pictures: Pictures) -> tuple[Any, Any] | None:
    """The pictures and labels of torchvision's data sets in memory."""
    data = getattr(pictures, "data", None)
    labels = getattr(pictures, "targets", getattr(pictures, "labels", None))
    return None if data is None or labels is None else (data, labels)


def _file(path: str | Path) -> str:
    facts = Path(path).stat()
    return f"{path}|{facts.st_size}|{facts.st_mtime_ns}"


def _bytes(array: Any) -> bytes:
    return f"{array.dtype}|{array.shape}|".encode() + np.ascontiguousarray(array).tobytes()


def _text(text: str) -> bytes:
    """A text that may hold a file's name, whose bytes need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
