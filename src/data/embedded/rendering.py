"""Splits of an embedded set, drawn once and kept in the cache."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from src.checkpoints import atomic
from src.data.base import ArrayPictures, Splits
from src.data.embedded import EMBEDDED_SETS
from src.data.embedded.base import EmbeddedSet, Split

logger = logging.getLogger(__name__)


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
    path = cache / "embedded" / f"{embedded.name}-{split}-v{embedded.version}.npz"
    if path.is_file():
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                return ArrayPictures(arrays["images"], arrays["labels"])
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, BadZipFile):
            logger.warning("%s is damaged and drawn again", path)
    images, labels = embedded.build(split)
    with atomic(path) as temporary, temporary.open("wb") as target:
        np.savez(target, images=images, labels=labels)
    return ArrayPictures(images, labels)
