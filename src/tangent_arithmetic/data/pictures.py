"""Pictures as 8-bit RGB, whatever mode, depth, transparency or orientation a file has.

One function for every place where a picture is decoded, since `Image.convert("RGB")` cuts 16 bits
off at 255, takes floats in [0, 1] for black, and shows the colours that transparency hides.
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

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # modes of more than 8 bits a value
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose deep pictures Pillow scales to that
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
    """The picture in a file, as `to_rgb` gives it.

    Raises:
        OSError: if it is damaged or no picture; decoders may raise other errors, too.
        PictureError: if it cannot be converted faithfully.
    """
    with _despite_bad_metadata():
        image = Image.open(path)
    with image:
        return to_rgb(image, str(path))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture as 8-bit RGB, upright by its EXIF orientation, transparency over white.

    Black and white of deeper files stay black and white: 16 bits are scaled by 255 / 65535, other
    depths by what the file declares, floating point from [0, 1]. Of an animation or a file of
    several pages it is the first picture. 8-bit RGB without any of this keeps its pixels.

    Args:
        image: of any mode; decoded here if it has not been yet.
        name: what a user finds it by, for messages.

    Raises:
        PictureError: if its range of values is unknown, so that any conversion would be a guess.
    """
    raw = {str(tile[3]) for tile in getattr(image, "tile", ())}  # gone once it is decoded
    image.load()
    if image.mode in DEEP:
        rgb = _from_deep(image, name)
    elif image.has_transparency_data:
        rgb = _on_white(image, raw, name)
    else:
        rgb = image.convert("RGB")
    turn = TURNS.get(_orientation(image))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info.clear()  # it is applied; whoever converts again must find nothing to apply
    return rgb


def is_plain(image: Image.Image) -> bool:
    """Whether a picture that was decoded elsewhere is grey or RGB, with nothing to apply."""
    return image.mode in ("L", "RGB") and not image.info


def _on_white(image: Image.Image, raw: set[str], name: str) -> Image.Image:
    hidden = image.info.get("transparency")
    if image.mode == "RGB" and (any(";16" in mode for mode in raw) or max(hidden or (0,)) > 255):
        raise PictureError(
            f"{name} has 16 bits a channel and names a colour as transparent, which cannot be told "
            "from similar ones; save it with an alpha channel, or with 8 bits"
        )
    if factor := next((SHALLOW[mode] for mode in raw & SHALLOW.keys()), None):
        image = image.copy()
        image.info["transparency"] = factor * int(hidden or 0)
    if image.mode == "La":  # no way leads straight to RGBA
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_deep(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    white = 1 if image.mode == "F" else _declared_white(image) or _white_of(values, name)
    levels = np.rint(values * (255 / white))
    if not (levels.min() >= 0 and levels.max() <= 255):  # nor where one is not a number
        raise _unknown_range(values, name, f"expected 0 to {white}")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    if (hidden := image.info.get("transparency")) is not None:
        levels[values == hidden] = 255
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _declared_white(image: Image.Image) -> int | None:
    """The value of white by the format or the tags of an integer picture's file."""
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:
        bits, signed = tags.get(BITS, (1,))[0], tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
        return (1 << (bits - signed)) - 1 if bits <= 16 else None
    return 65535 if image.format in SIXTEEN_BITS else None


def _white_of(values: np.ndarray, name: str) -> int:
    """65535 for a picture of unknown depth that holds 16-bit values, and not 8-bit ones."""
    if values.min() >= 0 and (values.max() == 0 or 255 < values.max() <= 65535):
        return 65535
    raise _unknown_range(values, name, "expected 16-bit values, 0 to 65535 and not all below 256")


def _unknown_range(values: np.ndarray, name: str, expected: str) -> PictureError:
    return PictureError(
        f"{name} has values from {values.min():g} to {values.max():g} ({values.dtype.name}), "
        f"{expected}: what is white there is unknown. Save it with 8 or 16 bits a value"
    )


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation, 1 (upright) without one; metadata may be damaged in a good picture."""
    if not METADATA & image.info.keys():
        return 1
    try:
        with _despite_bad_metadata():
            return image.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever its parser says of damaged metadata
        return 1


@contextmanager
def _despite_bad_metadata() -> Iterator[None]:
    """Drops warnings of EXIF that is cut short, in pictures that are fine."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
        yield
