"""LandCover: eight types of land cover seen from above (EuroSAT's role)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from tangent_arithmetic.data.embedded.base import SYNTHETIC_SIZES, EmbeddedSet, render_split
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    TASK,
    Rng,
    Style,
    blend,
    clouds,
    finish,
    jitter,
    to_image,
)

GREENS = ((70, 120, 50), (100, 140, 60), (130, 150, 80))
SOILS = ((150, 125, 80), (185, 165, 110), (120, 140, 70), (170, 160, 60))


def _meadow(rng: Rng) -> Image.Image:
    green = GREENS[int(rng.integers(3))]
    return blend(clouds(rng, 4), jitter(rng, green), jitter(rng, green, 35))


def _band(
    rng: Rng, image: Image.Image, fill: tuple[int, int, int], width: int, bend: float
) -> None:
    """Draws a band across the image, straight if `bend` is 0."""
    t = np.linspace(-0.2, 1.2, 24) * CANVAS
    swing = bend * CANVAS * np.sin(t / CANVAS * rng.uniform(3, 7) + rng.uniform(0, 6))
    middle = rng.uniform(0.3, 0.7) * CANVAS + rng.uniform(-0.5, 0.5) * (t - CANVAS / 2) + swing
    points = list(zip(t.tolist(), middle.tolist(), strict=True))
    if rng.random() < 0.5:
        points = [(b, a) for a, b in points]
    ImageDraw.Draw(image).line(points, fill=fill, width=width, joint="curve")


def _forest(rng: Rng) -> Image.Image:
    dark = jitter(rng, (25, 65, 30), 12)
    return blend(clouds(rng, 12, 2), dark, jitter(rng, (55, 105, 50), 15))


def _crops(rng: Rng) -> Image.Image:
    image = Image.new("RGB", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(image)
    cuts_x = [0, *sorted(rng.integers(14, CANVAS - 14, 1 + int(rng.integers(2)))), CANVAS]
    cuts_y = [0, *sorted(rng.integers(14, CANVAS - 14, 1)), CANVAS]
    for left, right in pairwise(cuts_x):
        for top, bottom in pairwise(cuts_y):
            soil = jitter(rng, SOILS[int(rng.integers(4))])
            draw.rectangle((left, top, right, bottom), fill=soil)
            if rng.random() < 0.7:
                for row in range(int(left), int(right), 4):
                    draw.line((row, top, row, bottom), fill=jitter(rng, soil, 8), width=2)
    return image


def _lake(rng: Rng) -> Image.Image:
    image = _meadow(rng)
    centre, size = rng.uniform(0.3, 0.7, 2) * CANVAS, rng.uniform(0.45, 0.7, 2) * CANVAS
    box = (*(centre - size / 2).tolist(), *(centre + size / 2).tolist())
    ImageDraw.Draw(image).ellipse(box, fill=jitter(rng, (35, 70, 125), 18))
    return image


def _river(rng: Rng) -> Image.Image:
    image = _meadow(rng)
    _band(rng, image, jitter(rng, (45, 85, 135), 18), int(rng.integers(9, 16)), 0.14)
    return image


def _highway(rng: Rng) -> Image.Image:
    image = _meadow(rng)
    width = int(rng.integers(9, 15))
    _band(rng, image, jitter(rng, (150, 150, 150), 20), width, 0.0)
    return image


def _houses(rng: Rng) -> Image.Image:
    image = _meadow(rng)
    draw, step = ImageDraw.Draw(image), int(rng.integers(14, 19))
    for left in range(2, CANVAS, step):
        for top in range(2, CANVAS, step):
            if rng.random() < 0.85:
                x, y = left + rng.uniform(-2, 2), top + rng.uniform(-2, 2)
                roof = jitter(rng, (175, 85, 60), 30)
                draw.rectangle((x, y, x + step * 0.55, y + step * 0.55), fill=roof)
    return image


def _industry(rng: Rng) -> Image.Image:
    image = Image.new("RGB", (CANVAS, CANVAS), jitter(rng, (120, 118, 112), 15))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 6))):
        x, y = rng.uniform(0, CANVAS - 20, 2)
        w, h = rng.uniform(16, 34, 2)
        draw.rectangle((x, y, x + w, y + h), fill=jitter(rng, (205, 205, 210), 30))
    return image


def _orchard(rng: Rng) -> Image.Image:
    image = blend(clouds(rng, 4), jitter(rng, (165, 145, 95), 15), jitter(rng, (150, 135, 85), 15))
    draw, step = ImageDraw.Draw(image), int(rng.integers(9, 13))
    for left in range(-2, CANVAS, step):
        for top in range(-2, CANVAS, step):
            x, y = left + rng.uniform(-1, 1), top + rng.uniform(-1, 1)
            tree = jitter(rng, (45, 90, 40), 15)
            draw.ellipse((x, y, x + step * 0.6, y + step * 0.6), fill=tree)
    return image


COVERS: dict[str, Callable[[Rng], Image.Image]] = {
    "forest": _forest,
    "crop fields": _crops,
    "lake": _lake,
    "river": _river,
    "highway": _highway,
    "houses": _houses,
    "factories": _industry,
    "orchard": _orchard,
}
COVER_NAMES = tuple(COVERS)


def draw_cover(rng: Rng, name: str, style: Style) -> np.ndarray:
    """One type of land cover from above, in summer and under a clear sky."""
    return finish(rng, COVERS[name](rng), style)


def draw_in_season(
    rng: Rng,
    name: str,
    style: Style,
    tint: tuple[float, float] = (0.45, 1.2),
    haze: float = 2.0,
    bands: tuple[int, int, int] = (0, 1, 2),
) -> np.ndarray:
    """The same under clouds of at most `haze`, each channel scaled by a random factor in `tint`.

    `bands` are the channels shown as red, green and blue.
    """
    veil = np.clip(clouds(rng, 3) - 0.45, 0, 1) * rng.uniform(0, haze)
    pixels = np.asarray(COVERS[name](rng), dtype=float) * (1 - veil[..., None])
    tinted = finish(rng, to_image(pixels + 235 * veil[..., None]), style) * rng.uniform(*tint, 3)
    noisy = np.clip(tinted + rng.normal(0, style.noise, tinted.shape), 0, 255).astype(np.uint8)
    return noisy[..., list(bands)]


def _draw(rng: Rng, label: int) -> np.ndarray:
    # false colours: plants are red, as in infrared photographs
    return draw_in_season(rng, COVER_NAMES[label], TASK, bands=(1, 2, 0))


LANDCOVER = EmbeddedSet(
    name="LandCover",
    classnames=COVER_NAMES,
    templates=(
        "a satellite photo of {}.",
        "an aerial photo of {}.",
        "{} seen from above.",
        "a satellite image of {}.",
    ),
    build=render_split(_draw, len(COVERS), 305, SYNTHETIC_SIZES),
    source="synthetic, drawn by this project",
    version=2,
)
