"""All public data sets, of images and of texts."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping

from tangent_arithmetic.data import clip20, text_suite
from tangent_arithmetic.data.sources import PublicSet

ALL_SETS: MutableMapping[str, PublicSet] = ChainMap(clip20.PUBLIC_SETS, text_suite.TEXT_SETS)


def classnames(name: str) -> tuple[str, ...]:
    """The class names of a public data set, in the order of the labels; needs no files."""
    own = text_suite.CLASSES
    return own[name] if name in own else clip20.classnames(name)
