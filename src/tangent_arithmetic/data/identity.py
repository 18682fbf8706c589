"""Hashes that identify the images of a split.

`fingerprint` changes with every image; caches of computed values use it as their key. `split_hash`
identifies which images a split has, the same on every machine; results and checkpoints record it.
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
from tangent_arithmetic.data.files import samples_of
from tangent_arithmetic.data.hub import HubPictures
from tangent_arithmetic.data.plain import DatasetPictures
from tangent_arithmetic.data.texts import Texts

SAMPLED = 64  # images of a split whose content is hashed


def fingerprint(pictures: Pictures) -> str | None:
    """A hash of a split's images, labels and their order.

    Images in memory are hashed by content, files, of one image or all, by path, size and
    modification time: a file replaced on disk changes the hash, and no file is read.

    Returns:
        64 hexadecimal digits; None for an unknown type of data set.
    """
    if isinstance(pictures, SubsetPictures):
        inner = fingerprint(pictures.pictures)
        return inner and _hash(inner.encode(), _bytes(np.asarray(pictures.indices)))
    if isinstance(pictures, HubPictures):
        return _hash(pictures.identity.encode())
    if isinstance(pictures, Texts):
        return _hash(_bytes(pictures.labels), *(_text(text) for text in pictures.texts))
    if (samples := samples_of(pictures)) is not None:
        return _hash(*(_text(f"{_file(path)}|{label}") for path, label in samples))
    if (files := _stored(pictures)) is not None:
        return _hash(*(_text(_file(path)) for path in files))
    if (arrays := _arrays(pictures)) is not None:
        return _hash(*(_bytes(np.asarray(array)) for array in arrays))
    return None


def split_ids(pictures: Pictures) -> list[str] | None:
    """One id per image, in order, independent of the data set's folder and of the content.

    The id of a file is its path below the folder common to all files; that of an image in an array
    or a row of the hub is its index.

    Returns:
        The ids; None for an unknown type of data set.
    """
    if isinstance(pictures, SubsetPictures):
        inner = split_ids(pictures.pictures)
        return inner and [inner[int(index)] for index in pictures.indices]
    if isinstance(pictures, HubPictures):
        return [f"hub/{index}" for index in range(len(pictures))]
    if isinstance(pictures, Texts):
        return pictures.ids
    if (samples := samples_of(pictures)) is not None:
        return _below([str(path) for path, _ in samples])
    if isinstance(pictures, DatasetPictures) or _stored(pictures) or _arrays(pictures) is not None:
        return [str(index) for index in range(len(pictures))]
    return None


def pictures_hash(pictures: Pictures) -> str:
    """A hash of the content of a split, regardless of its folder.

    Images in memory are hashed by content; files by relative path, label and size, and `SAMPLED` of
    them, evenly spaced, by content; for any other type of data set as many images are decoded.

    Returns:
        64 hexadecimal digits.
    """
    spread = range(0, len(pictures), max(1, len(pictures) // SAMPLED))
    if (files := _files(pictures)) is not None:
        names = _below([str(path) for path, _ in files])
        parts = [
            _text(f"{name}|{label}|{Path(path).stat().st_size}")
            for name, (path, label) in zip(names, files, strict=True)
        ]
        return _hash(*parts, *(Path(files[index][0]).read_bytes() for index in spread))
    if _stored(pictures) is None and (digest := fingerprint(pictures)) is not None:
        return digest
    decoded = (pictures[index] for index in spread)
    return _hash(*(_bytes(np.asarray(x)) + f"|{label}".encode() for x, label in decoded))


def times_hash(pictures: Pictures) -> str | None:
    """A hash of the modification times of a split's files; None if its images are not files.

    It notices single files replaced by others of the same size, which `pictures_hash` may miss, but
    differs for a copy of the same files.
    """
    if (files := _files(pictures)) is None:
        return None
    return _hash(*(str(Path(path).stat().st_mtime_ns).encode() for path, _ in files))


def _files(pictures: Pictures) -> Sequence[tuple[str | Path, int]] | None:
    """Path and label of each image; None if the split does not consist of files."""
    if isinstance(pictures, SubsetPictures):
        inner = _files(pictures.pictures)
        return inner and [inner[int(index)] for index in pictures.indices]
    return samples_of(pictures)


def labels_of(pictures: Pictures) -> np.ndarray:
    """The label of every image, int64; uint8 (images, classes) for a multi-label data set.

    Images are decoded only if there is no list of labels.
    """
    if isinstance(pictures, SubsetPictures):
        return labels_of(pictures.pictures)[np.asarray(pictures.indices, np.int64)]
    if isinstance(pictures, HubPictures):
        codes = pictures.rows[pictures.label]
        return np.array([pictures.labels[code] for code in codes], dtype=np.int64)
    listed = getattr(pictures, "targets", getattr(pictures, "labels", None))
    if isinstance(listed, np.ndarray) and listed.ndim == 2:
        return listed.astype(np.uint8, copy=False)
    if (samples := samples_of(pictures)) is not None:
        return np.array([label for _, label in samples], dtype=np.int64)
    labels = [pictures[i][1] for i in range(len(pictures))] if listed is None else listed
    array = np.asarray(labels)
    return array.astype(np.uint8 if array.ndim == 2 else np.int64)


def split_hash(pictures: Pictures) -> str | None:
    """A hash of `split_ids`: equal for the same images in the same order."""
    ids = split_ids(pictures)
    return None if ids is None else _hash(_text("\n".join(ids)))


def _below(paths: list[str]) -> list[str]:
    """The paths relative to their common folder."""
    if not paths:
        return []
    paths = [path.replace(os.sep, "/") for path in paths]
    ends = min(paths), max(paths)  # the common prefix of these two is that of all
    shared = posixpath.commonpath([posixpath.dirname(end) for end in ends])
    return [path[len(shared) :].lstrip("/") for path in paths]


def _stored(pictures: Pictures) -> Sequence[Path] | None:
    """The files that hold all images and labels of a split, as of PCAM; else None."""
    return getattr(pictures, "files", None)


def _arrays(pictures: Pictures) -> tuple[Any, Any] | None:
    """The images and labels of data sets in memory, ours and torchvision's."""
    if isinstance(pictures, ArrayPictures):
        return pictures.images, pictures.labels
    data = getattr(pictures, "data", None)
    labels = getattr(pictures, "targets", getattr(pictures, "labels", None))
    return None if data is None or labels is None else (data, labels)


def _file(path: str | Path) -> str:
    facts = Path(path).stat()
    return f"{path}|{facts.st_size}|{facts.st_mtime_ns}"


def _bytes(array: Any) -> bytes:
    return f"{array.dtype}|{array.shape}|".encode() + np.ascontiguousarray(array).tobytes()


def _text(text: str) -> bytes:
    """Encodes a text with a file name, which need not be valid UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
