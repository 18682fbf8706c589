"""The embedded suite: eight small tasks, a control set and a model that need no download."""

from __future__ import annotations

from src.data.embedded.base import EmbeddedSet
from src.data.embedded.glyphs import DIGITS_SET, LETTERS_SET, STREET_DIGITS, STREET_LETTERS
from src.data.embedded.landcover import LANDCOVER
from src.data.embedded.real import EMOJI, FASHION, MNIST
from src.data.embedded.shapes import SHAPES
from src.data.embedded.signs import SIGNS_SET
from src.data.embedded.textures import TEXTURES_SET

EMBEDDED_SETS: dict[str, EmbeddedSet] = {
    embedded.name: embedded
    for embedded in (
        EMOJI,
        FASHION,
        LANDCOVER,
        LETTERS_SET,
        MNIST,
        SIGNS_SET,
        STREET_DIGITS,
        TEXTURES_SET,
        SHAPES,
        DIGITS_SET,
        STREET_LETTERS,
    )
}
