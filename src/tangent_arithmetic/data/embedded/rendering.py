"""The splits of the embedded data sets, rendered once and cached."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tangent_arithmetic.data.base import ArrayPictures, Splits
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.base import SPLITS, EmbeddedSet, Split
from tangent_arithmetic.data.embedded.drawing import SIZE
from tangent_arithmetic.runtime.atomic import atomic
from tangent_arithmetic.runtime.software import sources_hash

logger = logging.getLogger(__name__)

DAMAGED = (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, BadZipFile)


def load_embedded(name: str, cache: Path) -> Splits:
    """The splits of an embedded set.

    Args:
        name: a key of `EMBEDDED_SETS`.
        cache: folder for rendered images.
    """
    embedded = EMBEDDED_SETS[name]
    train, val, test = (_split(embedded, split, cache) for split in SPLITS)
    return Splits(train, test, embedded.classnames, val)


def _split(embedded: EmbeddedSet, split: Split, cache: Path) -> ArrayPictures:
    """The images of a split, cached with a hash of the code that draws them."""
    path = cache / "embedded" / f"{embedded.name}-{split}-v{embedded.version}.npz"
    sources = sources_hash(("data/embedded",))
    if path.is_file():
        try:
            return _read(path, sources, len(embedded.classnames))
        except DAMAGED as error:
            logger.warning("%s is rendered again: %s", path, error)
    images, labels = embedded.build(split)
    with atomic(path) as temporary, temporary.open("wb") as target:
        np.savez(target, images=images, labels=labels, sources=np.array(sources))
    return ArrayPictures(images, labels)


def _read(path: Path, sources: str, classes: int) -> ArrayPictures:
    """Reads cached images; reading the archive verifies its checksums.

    Raises:
        One of `DAMAGED`: if they are damaged, or were drawn by other code.
    """
    with path.open("rb") as file, np.load(file) as arrays:
        images, labels, drawn_by = arrays["images"], arrays["labels"], str(arrays["sources"])
    if drawn_by != sources:
        raise ValueError("it was rendered by other code")
    kinds = images.dtype == np.uint8 and labels.dtype == np.int64 and labels.ndim == 1
    if not kinds or images.shape != (len(labels), SIZE, SIZE, 3):
        raise ValueError(f"it holds {images.dtype}{images.shape} and {labels.dtype}{labels.shape}")
    if not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"it has labels outside of 0 to {classes - 1}")
    return ArrayPictures(images, labels)
