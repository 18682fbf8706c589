"""Traffic signs: twenty combinations of a board and a symbol (GTSRB's role)."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from tangent_arithmetic.data.embedded.base import SYNTHETIC_SIZES, EmbeddedSet, render_split
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    TASK,
    Colour,
    Rng,
    Style,
    blank,
    blend,
    clouds,
    finish,
    jitter,
    pick,
    random_colour,
    write,
)

RED, BLUE, YELLOW = (200, 30, 40), (30, 80, 190), (245, 200, 40)
WHITE, BLACK = (245, 245, 245), (20, 20, 20)
Point = tuple[float, float]


HALF = CANVAS // 2
CORNERS = {  # shape of a board -> (number of corners, turn in degrees)
    "triangle": (3, 0.0),
    "inverted": (3, 180.0),
    "diamond": (4, 0.0),
    "octagon": (8, 22.5),
}
ARROW = ((-5, 18), (-5, -3), (-13, -3), (0, -19), (13, -3), (5, -3), (5, 18))


def _box(left: int, top: int, right: int, bottom: int) -> tuple[int, int, int, int]:
    """A box given relative to the centre of the canvas."""
    return HALF + left, HALF + top, HALF + right, HALF + bottom


def _polygon(sides: int, radius: float, turn: float) -> list[Point]:
    angles = 2 * np.pi * np.arange(sides) / sides + np.deg2rad(turn) - np.pi / 2
    return [(HALF + radius * np.cos(a), HALF + radius * np.sin(a)) for a in angles]


def _board(draw: ImageDraw.ImageDraw, shape: str, rim: Colour, face: Colour) -> None:
    if shape == "circle":
        draw.ellipse(_box(-28, -28, 28, 28), fill=rim)
        draw.ellipse(_box(-22, -22, 22, 22), fill=face)
    elif shape == "square":
        draw.rectangle(_box(-25, -25, 25, 25), fill=rim)
        draw.rectangle(_box(-22, -22, 22, 22), fill=face)
    else:
        sides, turn = CORNERS[shape]
        draw.polygon(_polygon(sides, 30, turn), fill=rim)
        draw.polygon(_polygon(sides, 20 if sides == 3 else 25, turn), fill=face)


# name -> (shape of the board, rim, face, symbol); symbols: text, or one of the words drawn below
SIGNS: dict[str, tuple[str, Colour, Colour, str]] = {
    "speed limit thirty": ("circle", RED, WHITE, "30"),
    "speed limit fifty": ("circle", RED, WHITE, "50"),
    "speed limit eighty": ("circle", RED, WHITE, "80"),
    "no entry": ("circle", RED, RED, "<bar>"),
    "no vehicles": ("circle", RED, WHITE, ""),
    "stop": ("octagon", WHITE, RED, "STOP"),
    "yield": ("inverted", RED, WHITE, ""),
    "priority road": ("diamond", WHITE, YELLOW, ""),
    "turn left": ("circle", BLUE, BLUE, "<270>"),
    "turn right": ("circle", BLUE, BLUE, "<90>"),
    "go straight": ("circle", BLUE, BLUE, "<0>"),
    "roundabout": ("circle", BLUE, BLUE, "<ring>"),
    "general caution": ("triangle", RED, WHITE, "!"),
    "crossroads": ("triangle", RED, WHITE, "+"),
    "bumpy road": ("triangle", RED, WHITE, "<bumps>"),
    "parking": ("square", WHITE, BLUE, "P"),
    "hospital": ("square", WHITE, BLUE, "H"),
    "dead end": ("square", WHITE, BLUE, "<tee>"),
    "no stopping": ("circle", RED, BLUE, "<cross>"),
    "one way": ("square", WHITE, BLUE, "<0>"),
}
SIGN_NAMES = tuple(SIGNS)


def _symbol(rng: Rng, image: Image.Image, symbol: str, face: Colour, style: Style) -> None:
    draw = ImageDraw.Draw(image)
    if symbol == "<bar>":
        draw.rectangle(_box(-19, -6, 19, 6), fill=WHITE)
    elif symbol == "<ring>":
        draw.ellipse(_box(-14, -14, 14, 14), outline=WHITE, width=6)
    elif symbol == "<bumps>":
        draw.ellipse(_box(-13, 0, 0, 12), fill=BLACK)
        draw.ellipse(_box(0, 0, 13, 12), fill=BLACK)
    elif symbol == "<tee>":
        draw.rectangle(_box(-4, -6, 4, 18), fill=WHITE)
        draw.rectangle(_box(-14, -16, 14, -6), fill=RED)
    elif symbol == "<cross>":
        draw.line(_box(-16, -16, 16, 16), fill=RED, width=6)
        draw.line(_box(-16, 16, 16, -16), fill=RED, width=6)
    elif symbol.startswith("<"):  # an arrow, turned by these degrees
        turn = np.deg2rad(float(symbol[1:-1]))
        cos, sin = np.cos(turn), np.sin(turn)
        points = [(HALF + x * cos - y * sin, HALF + x * sin + y * cos) for x, y in ARROW]
        draw.polygon(points, fill=WHITE)
    elif symbol:
        size, low = {1: 34, 2: 28, 4: 17}[len(symbol)], 4 if symbol in "!+" else 0
        ink = BLACK if sum(face) > 400 else WHITE
        write(image, symbol, pick(rng, style.fonts), size, ink, (HALF, HALF + low))


def draw_sign(rng: Rng, name: str, style: Style, scenery: bool) -> np.ndarray:
    """A traffic sign on a plain background, or on a cloudy one if `scenery`."""
    shape, rim, face, symbol = SIGNS[name]
    background = random_colour(rng, 60, 220)
    image = blank(background)
    if scenery:
        other = jitter(rng, background, 60)
        image = blend(clouds(rng, 5), background, other)
    _board(ImageDraw.Draw(image), shape, jitter(rng, rim), jitter(rng, face))
    _symbol(rng, image, symbol, face, style)
    return finish(rng, image, style, fill=background)


def draw_at_dusk(
    rng: Rng, name: str, style: Style, light: tuple[float, float] = (0.25, 0.6)
) -> np.ndarray:
    """A sign in front of scenery at dusk; `light` is the range of brightness, 1 being daylight."""
    image = draw_sign(rng, name, style, scenery=True)
    colour = rng.uniform(*light) * np.array([0.75, 0.85, 1.25])
    grain = rng.normal(0, 6, image.shape)
    return np.clip(image * colour + 8 + grain, 0, 255).astype(np.uint8)


def _draw(rng: Rng, label: int) -> np.ndarray:
    return draw_at_dusk(rng, SIGN_NAMES[label], TASK, light=(0.07, 0.2))


SIGNS_SET = EmbeddedSet(
    name="Signs",
    classnames=SIGN_NAMES,
    templates=(
        'a photo of a "{}" traffic sign.',
        "a {} sign.",
        "a picture of a {} sign.",
        "a {} road sign.",
    ),
    build=render_split(_draw, len(SIGNS), 304, SYNTHETIC_SIZES),
    source="synthetic, drawn by this project with fonts that come with Matplotlib",
    version=2,
)
