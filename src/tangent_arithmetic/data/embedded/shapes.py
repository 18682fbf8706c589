"""Shapes: colours x forms, the control set (ImageNet's role).

The pool has coloured shapes, too, but in another style: the control set has its own variation of
colours, outlines and rotation, cloudy backgrounds, blur and noise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from tangent_arithmetic.data.embedded.base import EmbeddedSet, render_split
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    COLOURS,
    TASK,
    Colour,
    Rng,
    clouds,
    finish,
    jitter,
    to_image,
)

FORMS = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
CONTROL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
CONTROL = replace(TASK, rotation=12.0, shear=0.1, noise=16.0, blur=1.2, contrast=0.65)
CONTROL_CLASSES = tuple(f"{colour} {form}" for colour in CONTROL_COLOURS for form in FORMS)


def _outline(form: str, x: float, y: float, r: float, turn: float) -> list[tuple[float, float]]:
    """Corner points of a form of radius r around (x, y); `turn` in radians."""
    if form == "square":
        angles, radii = np.pi / 4 + np.pi / 2 * np.arange(4), np.full(4, 1.2)
    elif form == "diamond":
        angles, radii = np.pi / 2 * np.arange(4), np.array([0.75, 1.25, 0.75, 1.25])
    elif form == "triangle":
        angles, radii = -np.pi / 2 + 2 * np.pi / 3 * np.arange(3), np.full(3, 1.25)
    elif form == "star":
        angles = -np.pi / 2 + np.pi / 5 * np.arange(10)
        radii = np.where(np.arange(10) % 2 == 0, 1.25, 0.5)
    elif form == "cross":
        corners = np.array(
            [
                *((-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)),
                *((1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)),
            ]
        )
        angles, radii = np.arctan2(corners[:, 1], corners[:, 0]), np.hypot(*corners.T) / 2.8
    elif form == "heart":
        t = np.linspace(0, 2 * np.pi, 40)
        hx = 16 * np.sin(t) ** 3
        hy = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        angles, radii = np.arctan2(hy, hx), np.hypot(hx, hy) / 15
    else:  # circle, ring
        angles, radii = np.linspace(0, 2 * np.pi, 40), np.ones(40)
    return [
        (x + r * k * np.cos(a + turn), y + r * k * np.sin(a + turn))
        for a, k in zip(angles, radii, strict=True)
    ]


def draw_form(
    image: Image.Image,
    form: str,
    fill: Colour,
    centre: tuple[float, float],
    radius: float,
    turn: float = 0.0,
    hollow: bool = False,
) -> None:
    """Draws one form into the image; rings and hollow forms are drawn as outlines."""
    draw, points = ImageDraw.Draw(image), _outline(form, *centre, radius, turn)
    if form == "ring" or hollow:
        draw.line([*points, points[0], points[1]], fill=fill, width=max(3, int(radius * 0.35)))
    else:
        draw.polygon(points, fill=fill)


def draw_control(rng: Rng, label: int) -> np.ndarray:
    """A coloured form of the control set, uint8 (32, 32, 3)."""
    colour, form = CONTROL_CLASSES[label].split()
    ink = jitter(rng, COLOURS[colour], 32)
    light = colour in ("black", "brown", "blue", "purple", "green", "red")
    base = rng.integers(150, 256, 3) if light else rng.integers(0, 110, 3)
    ground = np.asarray(base)[None, None] + (clouds(rng, 3)[..., None] - 0.5) * rng.uniform(0, 90)
    image = to_image(ground)
    centre = (CANVAS / 2 + rng.uniform(-8, 8), CANVAS / 2 + rng.uniform(-8, 8))
    turn = rng.uniform(-0.3, 0.3)
    hollow = bool(form not in ("circle", "ring") and rng.random() < 0.25)
    draw_form(image, form, ink, centre, rng.uniform(12, 23), turn, hollow)
    return finish(rng, image, CONTROL)


SHAPES = EmbeddedSet(
    name="Shapes",
    classnames=CONTROL_CLASSES,
    templates=("a photo of a {}.", "a {}.", "a picture of a {}.", "a drawing of a {}."),
    build=render_split(draw_control, 64, 306, {"train": 1280, "val": 960, "test": 640}),
    source="synthetic, drawn by this project",
    version=3,
)
