"""The embedded suite: eight small tasks and a control set, generated or bundled: no download."""

from __future__ import annotations

from tangent_arithmetic.data.embedded.base import EmbeddedSet
from tangent_arithmetic.data.embedded.generic import GENERIC
from tangent_arithmetic.data.embedded.glyphs import (
    DIGITS_SET,
    LETTERS_SET,
    STREET_DIGITS,
    STREET_LETTERS,
)
from tangent_arithmetic.data.embedded.landcover import LANDCOVER
from tangent_arithmetic.data.embedded.real import EMOJI, FASHION, MNIST
from tangent_arithmetic.data.embedded.shapes import SHAPES
from tangent_arithmetic.data.embedded.signs import SIGNS_SET
from tangent_arithmetic.data.embedded.textures import TEXTURES_SET

_TASKS = (EMOJI, FASHION, LANDCOVER, LETTERS_SET, MNIST, SIGNS_SET, STREET_DIGITS, TEXTURES_SET)
EMBEDDED_SETS: dict[str, EmbeddedSet] = {
    embedded.name: embedded for embedded in (*_TASKS, SHAPES, DIGITS_SET, STREET_LETTERS, GENERIC)
}
