"""Letters and digits: clean printed ones for the pool, house numbers and letters as tasks."""

from __future__ import annotations

import string

import numpy as np
from PIL import Image

from src.data.embedded.base import SYNTHETIC_SIZES, EmbeddedSet, render_split
from src.data.embedded.drawing import (
    CANVAS,
    TASK,
    Rng,
    Style,
    blank,
    contrasting,
    distort,
    finish,
    gradient,
    jitter,
    pick,
    random_colour,
    write,
)

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple(string.ascii_uppercase)


def draw_glyph(rng: Rng, text: str, style: Style, coloured: bool = True) -> np.ndarray:
    """One character in the middle of a plain background."""
    background = random_colour(rng) if coloured else jitter(rng, (250, 250, 250))
    ink = contrasting(rng, background) if coloured else jitter(rng, (20, 20, 20))
    image = blank(background)
    write(image, text, pick(rng, style.fonts), int(rng.integers(42, 58)), ink)
    return finish(rng, distort(rng, image, style), style)


def draw_house_number(rng: Rng, label: int) -> np.ndarray:
    """A digit on a shaded wall, with parts of other digits left and right of it."""
    wall = random_colour(rng, 30, 226)
    image: Image.Image = gradient(rng, wall)
    ink, face = contrasting(rng, wall, 70), pick(rng, TASK.fonts)
    size = int(rng.integers(40, 54))
    write(image, str(label), face, size, ink)
    for side in (-1, 1):
        if rng.random() < 0.6:
            offset = side * rng.uniform(0.52, 0.7) * CANVAS
            neighbour = str(rng.integers(10))
            write(image, neighbour, face, size, ink, (CANVAS / 2 + offset, CANVAS / 2))
    return finish(rng, distort(rng, image, TASK), TASK)


def draw_letter(rng: Rng, label: int) -> np.ndarray:
    """A capital letter in a font that the pre-training pool does not contain."""
    return draw_glyph(rng, LETTERS[label], TASK)


STREET_DIGITS = EmbeddedSet(
    name="StreetDigits",
    classnames=DIGIT_NAMES,
    templates=(
        "a photo of the number {}.",
        "the digit {}.",
        "a picture of the digit {}.",
        "the number {} on a colored background.",
    ),
    build=render_split(draw_house_number, 10, 301, SYNTHETIC_SIZES),
    source="synthetic, drawn by this project with fonts that come with Matplotlib",
)

LETTERS_SET = EmbeddedSet(
    name="Letters",
    classnames=LETTERS,
    templates=(
        "a photo of the letter {}.",
        "the letter {}.",
        "the capital letter {}.",
        "a picture of the letter {}.",
    ),
    build=render_split(draw_letter, 26, 302, SYNTHETIC_SIZES),
    source="synthetic, drawn by this project with fonts that come with Matplotlib",
)
