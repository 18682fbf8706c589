"""Drawing primitives shared by the synthetic data sets and the pre-training pool.

Images are drawn with Pillow at twice the final size, distorted, and box-filtered to 32 x 32 RGB
pixels. A `Style` sets how hard they are to recognise. The pre-training pool mostly uses plain
styles; the tasks use stronger ones, other fonts and a different look, so that each task is a
distribution shift from the pool and not a subset of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.ndimage import map_coordinates

SIZE = 32  # side of every image of the suite in pixels
CANVAS = 64  # side of the canvas in pixels

Rng = np.random.Generator
Colour = tuple[int, int, int]

SANS, SERIF, MONO = "DejaVuSans", "DejaVuSerif", "DejaVuSansMono"
POOL_FONTS = (SANS, f"{SANS}-Bold", SERIF, "STIXGeneral", "cmr10", MONO)
BOLD_FONTS = (f"{SERIF}-Bold", f"{SANS}-BoldOblique", f"{MONO}-Bold")
TASK_FONTS = (*BOLD_FONTS, "STIXGeneralBol", "STIXGeneralBolIta", "cmb10", "cmss10", "cmtt10")

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 90, 205),
    "purple": (130, 60, 170),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
    "cyan": (60, 190, 210),
}


@dataclass(frozen=True)
class Style:
    """The strength of the distortions that `finish` applies to a drawn image.

    Attributes:
        fonts: names of Matplotlib's TrueType fonts to draw text with.
        rotation: largest rotation, degrees.
        shear: largest shear, a fraction of the width.
        zoom: range of the scale factor.
        shift: largest translation, pixels of the canvas.
        noise: largest standard deviation of Gaussian noise, in grey levels of 255.
        blur: largest radius of Gaussian blur, pixels of the canvas.
        contrast: smallest factor that contrast may be reduced to.
    """

    fonts: tuple[str, ...] = POOL_FONTS
    rotation: float = 4.0
    shear: float = 0.03
    zoom: tuple[float, float] = (0.9, 1.1)
    shift: float = 4.0
    noise: float = 5.0
    blur: float = 0.5
    contrast: float = 0.9


PLAIN = Style()
MOVED = Style(rotation=12.0, shear=0.12, zoom=(0.75, 1.2), shift=6.0)
VARIED = replace(MOVED, noise=12.0, blur=1.2, contrast=0.7)
ROUGH = Style(
    rotation=18.0, shear=0.2, zoom=(0.65, 1.2), shift=7.0, noise=24.0, blur=2.0, contrast=0.45
)
TASK = replace(ROUGH, fonts=TASK_FONTS, noise=16.0, blur=1.5, contrast=0.55)


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with Matplotlib, `size` in pixels."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size)


def pick(rng: Rng, options: Sequence[str]) -> str:
    """One of `options`, uniformly."""
    return options[int(rng.integers(len(options)))]


def random_colour(rng: Rng, low: int = 0, high: int = 256) -> Colour:
    """A colour whose channels are uniform in [low, high)."""
    r, g, b = rng.integers(low, high, 3).tolist()
    return r, g, b


def to_image(levels: np.ndarray) -> Image.Image:
    """An RGB image of grey levels of any type, shape (CANVAS, CANVAS, 3), clipped to 0 to 255."""
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def jitter(rng: Rng, colour: Colour, amount: int = 22) -> Colour:
    """`colour` moved by at most `amount` grey levels per channel."""
    r, g, b = np.clip(colour + rng.integers(-amount, amount + 1, 3), 0, 255).tolist()
    return r, g, b


def contrasting(rng: Rng, colour: Colour, least: float = 90.0) -> Colour:
    """A random colour whose luminance differs from that of `colour` by at least `least` of 255."""
    weights = np.array([0.299, 0.587, 0.114])
    luminance = float(np.dot(weights, colour))
    for _ in range(50):
        candidate = random_colour(rng)
        if abs(float(np.dot(weights, candidate)) - luminance) >= least:
            return candidate
    return (0, 0, 0) if luminance > 127 else (255, 255, 255)


def blank(colour: Colour) -> Image.Image:
    """An empty canvas of one colour."""
    return Image.new("RGB", (CANVAS, CANVAS), colour)


def gradient(rng: Rng, colour: Colour, strength: int = 50) -> Image.Image:
    """A canvas that shades linearly, in a random direction, around `colour`."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS - 0.5
    ramp = (np.cos(angle) * x + np.sin(angle) * y) * rng.uniform(0, 2 * strength)
    return to_image(np.asarray(colour) + ramp[..., None])


def clouds(rng: Rng, cells: int, octaves: int = 3) -> np.ndarray:
    """Smooth noise in [0, 1], shape (CANVAS, CANVAS): random grids, enlarged and summed."""
    total = np.zeros((CANVAS, CANVAS))
    for octave in range(octaves):
        grid = rng.random((min(cells << octave, CANVAS),) * 2).astype(np.float32)
        image = Image.fromarray(grid).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        total += np.asarray(image) * 0.5**octave
    low, high = total.min(), total.max()
    levels: np.ndarray = (total - low) / max(high - low, 1e-6)
    return levels


def blend(mask: np.ndarray, one: Colour, other: Colour) -> Image.Image:
    """An image that is `one` where `mask` is 0 and `other` where it is 1."""
    return to_image(np.asarray(one) * (1 - mask[..., None]) + np.asarray(other) * mask[..., None])


def write(
    image: Image.Image,
    text: str,
    font_name: str,
    size: int,
    fill: Colour,
    centre: tuple[float, float] = (CANVAS / 2, CANVAS / 2),
    outline: Colour | None = None,
) -> None:
    """Writes `text` centred at `centre`, `size` pixels high; an outline is two pixels wide."""
    face, width = font(font_name, size), 0 if outline is None else 2
    draw = ImageDraw.Draw(image)
    draw.text(centre, text, fill, face, "mm", stroke_width=width, stroke_fill=outline)


def wobble(rng: Rng, image: Image.Image, strength: float) -> Image.Image:
    """Shifts every pixel by smooth noise of at most `strength` pixels, like an unsteady hand."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    dx, dy = ((clouds(rng, 3, 2) - 0.5) * 2 * strength for _ in range(2))
    channels = np.moveaxis(np.asarray(image), -1, 0)
    moved = [map_coordinates(c, (y + dy, x + dx), order=1, mode="nearest") for c in channels]
    return Image.fromarray(np.stack(moved, axis=-1))


def _distorted(rng: Rng, image: Image.Image, style: Style, fill: Colour | None) -> Image.Image:
    """The image rotated, sheared, scaled and shifted; uncovered parts are `fill`."""
    angle = np.deg2rad(rng.uniform(-style.rotation, style.rotation))
    zoom = rng.uniform(*style.zoom)
    shear = rng.uniform(-style.shear, style.shear)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    a, b, d, e = cos, sin + shear, -sin, cos
    move = rng.uniform(-style.shift, style.shift, 2)
    half = CANVAS / 2
    c = half - a * (half + move[0]) - b * (half + move[1])
    f = half - d * (half + move[0]) - e * (half + move[1])
    edge = fill if fill is not None else image.getpixel((0, 0))
    affine, smooth = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, affine, (a, b, c, d, e, f), smooth, fillcolor=edge)


def finish(rng: Rng, image: Image.Image, style: Style, fill: Colour | None = None) -> np.ndarray:
    """Distorts a canvas, reduces it to 32 x 32, blurs, lowers contrast and adds noise.

    Args:
        rng: draws the strength of each distortion.
        image: the canvas, CANVAS x CANVAS pixels.
        style: the largest strengths.
        fill: colour of parts that the distortion uncovers; by default that of the top left pixel.

    Returns:
        uint8 array of shape (32, 32, 3).
    """
    image = _distorted(rng, image, style, fill).reduce(CANVAS // SIZE)
    radius = rng.uniform(0, style.blur) * SIZE / CANVAS
    if radius > 0.1:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    pixels = np.asarray(image, dtype=np.float32)
    contrast = rng.uniform(style.contrast, 1.0)
    pixels = 127.5 + (pixels - 127.5) * contrast + rng.uniform(-15, 15) * (1 - style.contrast)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    pixels = pixels + noise * np.float32(rng.uniform(0, style.noise))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def from_grey(images: np.ndarray) -> np.ndarray:
    """Centres greyscale images in 32 x 32 RGB images.

    Args:
        images: uint8 array of shape (n, side, side), side <= 32, bright on black.

    Returns:
        uint8 array of shape (n, 32, 32, 3).
    """
    margin = (SIZE - images.shape[1]) // 2
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    return np.repeat(padded[..., None], 3, axis=3)
