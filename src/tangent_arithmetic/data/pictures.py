"""Conversion of images of any mode, depth, transparency and orientation to 8-bit RGB.

Every image is decoded here, because `Image.convert("RGB")` clips 16-bit values at 255, turns floats
in [0, 1] black, and reveals the colours of transparent pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from tangent_arithmetic.runtime.errors import PictureError

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # modes of more than 8 bits per value
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose deep images Pillow scales to 16 bits
SHALLOW = {"L;2": 85, "L;4": 17}  # raw modes whose values Pillow multiplies, but not their tRNS
METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two


def read_rgb(path: str | Path) -> Image.Image:
    """Reads an image file and converts it with `to_rgb`.

    Raises:
        OSError: if it is damaged or not an image; decoders may raise other errors, too.
        PictureError: if it cannot be converted faithfully.
    """
    with _despite_bad_metadata():
        image = Image.open(path)
    with image:
        return to_rgb(image, str(path))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Converts an image to 8-bit RGB, upright by its EXIF orientation, on white if transparent.

    Deeper images keep black and white: 16 bits are scaled by 255 / 65535, other depths by the range
    that the file declares, floating point from [0, 1]. Animations and multi-page files yield their
    first image. Plain 8-bit RGB keeps its pixels.

    Args:
        image: of any mode, decoded or not.
        name: by which a user can find it, for messages.

    Raises:
        PictureError: if its range of values is unknown, so that any conversion would be a guess.
    """
    raw = {str(tile[3]) for tile in getattr(image, "tile", ())}  # empty once it is decoded
    image.load()
    if image.mode in DEEP:
        rgb = _from_deep(image, name)
    elif image.has_transparency_data:
        rgb = _on_white(image, raw, name)
    else:
        rgb = image.convert("RGB")
    turn = TURNS.get(_orientation(image))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # applied above; a second conversion must not apply it again
    return rgb


def is_plain(image: Image.Image) -> bool:
    """Whether a decoded image is RGB without transparency or orientation to apply."""
    return image.mode == "RGB" and not image.info


def _on_white(image: Image.Image, raw: set[str], name: str) -> Image.Image:
    hidden = image.info.get("transparency")
    if image.mode == "RGB" and (any(";16" in mode for mode in raw) or max(hidden or (0,)) > 255):
        raise PictureError(
            f"{name} has 16 bits per channel and a transparent colour, which cannot be told from "
            "similar colours; save it with an alpha channel, or with 8 bits"
        )
    if factor := next((SHALLOW[mode] for mode in raw & SHALLOW.keys()), None):
        image = image.copy()
        image.info["transparency"] = factor * int(hidden or 0)
    if image.mode == "La":  # cannot be converted to RGBA directly
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    white = 1 if image.mode == "F" else _declared_white(image) or _white_of(values, name)
    levels = np.rint(values * (255 / white))
    if not (levels.min() >= 0 and levels.max() <= 255):  # also true for NaN
        raise _unknown_range(values, name, f"expected 0 to {white}")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    if (hidden := image.info.get("transparency")) is not None:
        levels[values == hidden] = 255
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _declared_white(image: Image.Image) -> int | None:
    """The value of white in an integer image, by its format or tags."""
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:
        bits, signed = tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
        return (1 << (bits - signed)) - 1 if bits <= 16 else None
    return 65535 if image.format in SIXTEEN_BITS else None


def _white_of(values: np.ndarray, name: str) -> int:
    """65535 for an image of unknown depth that holds 16-bit and not 8-bit values."""
    if values.min() >= 0 and (values.max() == 0 or 255 < values.max() <= 65535):
        return 65535
    raise _unknown_range(values, name, "expected 16-bit values, 0 to 65535 and not all below 256")


def _unknown_range(values: np.ndarray, name: str, expected: str) -> PictureError:
    return PictureError(
        f"{name} has values from {values.min():g} to {values.max():g} ({values.dtype.name}), "
        f"{expected}: the value of white is unknown. Save it with 8 or 16 bits per value"
    )


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation; 1 (upright) if it is missing or damaged."""
    if not METADATA & image.info.keys():
        return 1
    try:
        with _despite_bad_metadata():
            return image.getexif().get(ORIENTATION, 1)
    except Exception:  # the parser raises almost anything for damaged metadata
        return 1


@contextmanager
def _despite_bad_metadata() -> Iterator[None]:
    """Suppresses warnings about truncated EXIF data in intact images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
        yield
