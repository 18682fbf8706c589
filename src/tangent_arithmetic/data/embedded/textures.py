"""Textures: sixteen patterns, in two colours in the pool, as reliefs in the task (DTD's role)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

from tangent_arithmetic.data.embedded.base import SYNTHETIC_SIZES, EmbeddedSet, render_split
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    TASK,
    Colour,
    Rng,
    Style,
    blend,
    clouds,
    finish,
    random_colour,
    to_image,
)

Grid = np.ndarray  # (CANVAS, CANVAS)
Pattern = Callable[[Rng, Grid, Grid, float], Grid]  # rng, x, y, period -> mask in [0, 1]


def _wave(t: Grid) -> Grid:
    return np.sin(2 * np.pi * t) > 0


def _dots(rng: Rng, x: Grid, y: Grid, p: float) -> Grid:
    return (x % p - p / 2) ** 2 + (y % p - p / 2) ** 2 < (0.3 * p) ** 2


def _bricks(rng: Rng, x: Grid, y: Grid, p: float) -> Grid:
    row = np.floor(y / (0.6 * p))
    joint = (y % (0.6 * p) < 0.1 * p) | ((x + (row % 2) * 0.6 * p) % (1.2 * p) < 0.1 * p)
    return ~joint


def _rings(rng: Rng, x: Grid, y: Grid, p: float) -> Grid:
    centre = rng.uniform(0.35, 0.65, 2) * CANVAS
    return _wave(np.hypot(x - centre[0], y - centre[1]) / p)


def _spotted(rng: Rng, x: Grid, y: Grid, p: float) -> Grid:
    mask = np.zeros_like(x)
    for _ in range(int(rng.integers(12, 24))):
        centre, radius = rng.uniform(0, CANVAS, 2), rng.uniform(2, 0.5 * p)
        mask[np.hypot(x - centre[0], y - centre[1]) < radius] = 1.0
    return mask


def _cracked(rng: Rng, x: Grid, y: Grid, p: float) -> Grid:
    seeds = rng.uniform(0, CANVAS, (14, 2))
    distance = np.hypot(x[None] - seeds[:, 0, None, None], y[None] - seeds[:, 1, None, None])
    distance = np.partition(distance, 1, axis=0)
    inside: Grid = distance[1] - distance[0] > 2.6
    return inside


PATTERNS: dict[str, Pattern] = {
    "horizontal stripes": lambda rng, x, y, p: _wave(y / p),
    "vertical stripes": lambda rng, x, y, p: _wave(x / p),
    "diagonal stripes": lambda rng, x, y, p: _wave((x + y) / (1.4 * p)),
    "checkerboard": lambda rng, x, y, p: (np.floor(x / p) + np.floor(y / p)) % 2,
    "polka dots": _dots,
    "grid": lambda rng, x, y, p: (x % p < 0.2 * p) | (y % p < 0.2 * p),
    "bricks": _bricks,
    "waves": lambda rng, x, y, p: _wave((y + 0.35 * p * np.sin(2 * np.pi * x / (1.8 * p))) / p),
    "zigzag": lambda rng, x, y, p: _wave((y + np.abs((x % (1.5 * p)) - 0.75 * p)) / p),
    "rings": _rings,
    "grainy": lambda rng, x, y, p: rng.random((CANVAS // 2,) * 2).repeat(2, 0).repeat(2, 1),
    "cloudy": lambda rng, x, y, p: clouds(rng, 4),
    "spots": _spotted,
    "cracks": _cracked,
    "triangles": lambda rng, x, y, p: np.abs(x % p - p / 2) * 2 < y % p,
    "crosshatch": lambda rng, x, y, p: ((x + y) % p < 0.18 * p) | ((x - y) % p < 0.18 * p),
}
TEXTURES = tuple(PATTERNS)


def _mask(rng: Rng, name: str, period: tuple[float, float]) -> Grid:
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(float)
    x, y = x + rng.uniform(0, CANVAS), y + rng.uniform(0, CANVAS)
    if name in ("rings", "spots", "cracks"):
        y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(float)
    return PATTERNS[name](rng, x, y, rng.uniform(*period)).astype(float)


def draw_texture(
    rng: Rng, name: str, style: Style, one: Colour, other: Colour, period: tuple[float, float]
) -> np.ndarray:
    """A pattern of two colours; `period` is its range of repeat lengths in canvas pixels."""
    return finish(rng, blend(_mask(rng, name, period), one, other), style, fill=one)


def draw_relief(
    rng: Rng, name: str, style: Style, light: tuple[float, float] = (90.0, 150.0)
) -> np.ndarray:
    """A pattern as a relief in one material, lit from the upper left.

    `light` is the range of the light's strength in grey levels; negative from the lower right.
    """
    height = gaussian_filter(_mask(rng, name, (11, 24)), rng.uniform(1.0, 1.8))
    slope = height - np.roll(height, (2, 2), axis=(0, 1))
    colour = random_colour(rng, 60, 200)
    shade = slope * rng.uniform(*light) + (height - 0.5) * rng.uniform(0, 40)
    return finish(rng, to_image(np.asarray(colour) + shade[..., None]), style, fill=colour)


def _draw(rng: Rng, label: int) -> np.ndarray:
    return draw_relief(rng, TEXTURES[label], TASK, light=(-90.0, -50.0))


TEXTURES_SET = EmbeddedSet(
    name="Textures",
    classnames=TEXTURES,
    templates=(
        "a photo of a {} texture.",
        "a {} pattern.",
        "a {} texture.",
        "a picture of a {} pattern.",
    ),
    build=render_split(_draw, len(TEXTURES), 303, SYNTHETIC_SIZES),
    source="synthetic, drawn by this project",
    version=2,
)
