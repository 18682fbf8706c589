"""Letters and digits: printed ones for the pool; outlined and street ones as tasks.

Two styles times two label sets make four related data sets (Letters, Digits, StreetLetters,
StreetDigits) for task analogies.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from tangent_arithmetic.data.embedded.base import SYNTHETIC_SIZES, EmbeddedSet, render_split
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    TASK,
    Rng,
    Style,
    blank,
    contrasting,
    finish,
    gradient,
    jitter,
    pick,
    random_colour,
    wobble,
    write,
)

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = tuple(string.digits)
LETTERS = tuple(string.ascii_uppercase)
DIGIT_TEMPLATES = (
    "a photo of the number {}.",
    "the digit {}.",
    "a picture of the digit {}.",
    "the number {} on a colored background.",
)
LETTER_TEMPLATES = (
    "a photo of the letter {}.",
    "the letter {}.",
    "the capital letter {}.",
    "a picture of the letter {}.",
)


def draw_glyph(
    rng: Rng, text: str, style: Style, coloured: bool = True, hand: float = 0.0
) -> np.ndarray:
    """One character on a plain background; `hand` is the amplitude of its wobble in pixels."""
    background = random_colour(rng) if coloured else jitter(rng, (250, 250, 250))
    ink = contrasting(rng, background) if coloured else jitter(rng, (20, 20, 20))
    if not coloured and rng.random() < 0.5:
        background, ink = ink, background
    image = blank(background)
    write(image, text, pick(rng, style.fonts), int(rng.integers(42, 58)), ink)
    if hand > 0:
        image = wobble(rng, image, hand)
    return finish(rng, image, style)


def draw_outlined(rng: Rng, text: str, style: Style, contrast: float = 80.0) -> np.ndarray:
    """An outlined character on a gradient, with a contrast of at least `contrast` of 255."""
    ground = random_colour(rng, 30, 226)
    image = gradient(rng, ground)
    face, ink = pick(rng, style.fonts), contrasting(rng, ground, contrast)
    write(image, text, face, int(rng.integers(42, 56)), jitter(rng, ground, 12), outline=ink)
    return finish(rng, image, style)


def draw_on_street(
    rng: Rng,
    text: str,
    neighbours: Sequence[str],
    style: Style,
    crowd: float = 0.6,
    gap: tuple[float, float] = (0.52, 0.7),
) -> np.ndarray:
    """A character on a gradient, with parts of others to its left and right.

    `crowd` is the probability of each neighbour, `gap` its distance as a fraction of the width.
    """
    wall = random_colour(rng, 30, 226)
    image = gradient(rng, wall)
    ink, face = contrasting(rng, wall, 70), pick(rng, style.fonts)
    size = int(rng.integers(40, 54))
    write(image, text, face, size, ink)
    for side in (-1, 1):
        if rng.random() < crowd:
            offset = side * rng.uniform(*gap) * CANVAS
            write(image, pick(rng, neighbours), face, size, ink, (CANVAS / 2 + offset, CANVAS / 2))
    return finish(rng, image, style)


def _set(name: str, texts: Sequence[str], seed: int, street: bool) -> EmbeddedSet:
    """A data set of digits or letters, as street signs or outlines."""

    def draw(rng: Rng, label: int) -> np.ndarray:
        if street:
            return draw_on_street(rng, texts[label], texts, TASK, crowd=1.0, gap=(0.34, 0.47))
        return draw_outlined(rng, texts[label], TASK)

    digits = texts is DIGITS
    return EmbeddedSet(
        name=name,
        classnames=DIGIT_NAMES if digits else LETTERS,
        templates=DIGIT_TEMPLATES if digits else LETTER_TEMPLATES,
        build=render_split(draw, len(texts), seed, SYNTHETIC_SIZES),
        source="synthetic, drawn by this project with fonts that come with Matplotlib",
        version=2,
    )


STREET_DIGITS = _set("StreetDigits", DIGITS, 301, street=True)
STREET_LETTERS = _set("StreetLetters", LETTERS, 307, street=True)
DIGITS_SET = _set("Digits", DIGITS, 308, street=False)
LETTERS_SET = _set("Letters", LETTERS, 302, street=False)
