"""Splits of an embedded set, drawn once and kept in the cache."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tangent_arithmetic.data.base import ArrayPictures, Splits
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.base import EmbeddedSet, Split
from tangent_arithmetic.data.embedded.drawing import SIZE
from tangent_arithmetic.runtime.atomic import atomic
from tangent_arithmetic.runtime.software import sources_hash

logger = logging.getLogger(__name__)

DAMAGED = (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, BadZipFile)


def load_embedded(name: str, cache: Path) -> Splits:
    """The splits of an embedded set.

    Args:
        name: a key of `EMBEDDED_SETS`.
        cache: folder to keep drawn pictures in.
    """
    embedded = EMBEDDED_SETS[name]
    parts = {split: _split(embedded, split, cache) for split in ("train", "val", "test")}
    return Splits(parts["train"], parts["test"], embedded.classnames, parts["val"])


def _split(embedded: EmbeddedSet, split: Split, cache: Path) -> ArrayPictures:
    """The pictures of a split, kept with a hash of the sources that draw them."""
    path = cache / "embedded" / f"{embedded.name}-{split}-v{embedded.version}.npz"
    sources = sources_hash(("data/embedded",))
    if path.is_file():
        try:
            return _read(path, sources, len(embedded.classnames))
        except DAMAGED as error:
            logger.warning("%s is drawn again: %s", path, error)
    images, labels = embedded.build(split)
    with atomic(path) as temporary, temporary.open("wb") as target:
        np.savez(target, images=images, labels=labels, sources=np.array(sources))
    return ArrayPictures(images, labels)


def _read(path: Path, sources: str, classes: int) -> ArrayPictures:
    """The kept pictures; the archive's checksums are checked as it is read.

    Raises:
        One of `DAMAGED`: if they are not whole, or were drawn by other sources.
    """
    with path.open("rb") as file, np.load(file) as arrays:
        images, labels, drawn_by = arrays["images"], arrays["labels"], str(arrays["sources"])
    if drawn_by != sources:
        raise ValueError("other sources drew it")
    kinds = images.dtype == np.uint8 and labels.dtype == np.int64 and labels.ndim == 1
    if not kinds or images.shape != (len(labels), SIZE, SIZE, 3):
        raise ValueError(f"it holds {images.dtype}{images.shape} and {labels.dtype}{labels.shape}")
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"it has labels that are none of {classes} classes")
    return ArrayPictures(images, labels)
