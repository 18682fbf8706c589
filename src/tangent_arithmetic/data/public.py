"""All public data sets, of images and of texts."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping

from tangent_arithmetic.data import clip20, text
from tangent_arithmetic.data.sources import PublicSet

ALL_SETS: MutableMapping[str, PublicSet] = ChainMap(clip20.PUBLIC_SETS, text.TEXT_SETS)


def classnames(name: str) -> tuple[str, ...]:
    """The class names of a public data set, in the order of the labels; needs no files."""
    return text.CLASSES[name] if name in text.CLASSES else clip20.classnames(name)
