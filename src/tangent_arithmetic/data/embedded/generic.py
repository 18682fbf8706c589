"""Pool: a generic pool of images for objectives that need images of no task and not of the control.

They are drawn like those of the pre-training pool, but anew, and without its coloured shapes, so
that the control set has no relatives among them, and without its emoji, whose files are in another
package. No image is one of any task, though characters, signs, textures, land and clothes are what
some tasks show in another style.
"""

from __future__ import annotations

import numpy as np

from tangent_arithmetic.data.embedded.base import SYNTHETIC_SIZES, EmbeddedSet, render_split
from tangent_arithmetic.data.embedded.drawing import Rng
from tangent_arithmetic.data.embedded.pool import FAMILIES

CLASSES = {  # name of a class -> family of the pre-training pool
    "character": "glyphs",
    "texture": "textures",
    "road sign": "signs",
    "land cover": "covers",
    "piece of clothing": "clothes",
}


def _draw(rng: Rng, label: int) -> np.ndarray:
    draw, _ = FAMILIES[list(CLASSES.values())[label]]
    return draw(rng)[0]


GENERIC = EmbeddedSet(
    name="Pool",
    classnames=tuple(CLASSES),
    templates=("a photo of a {}.", "a picture of a {}."),
    build=render_split(_draw, len(CLASSES), 312, SYNTHETIC_SIZES),
    source="synthetic, drawn by this project; clothes from Fashion-MNIST (MIT)",
)
