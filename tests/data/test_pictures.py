"""Every mode that PIL opens becomes RGB by what it means, or an error names the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tangent_arithmetic.data.files import ListedPictures
from tangent_arithmetic.data.hub import HubPictures
from tangent_arithmetic.data.loading import SeededPictures
from tangent_arithmetic.data.pictures import DEEP, ORIENTATION, read_rgb, to_rgb
from tangent_arithmetic.runtime.errors import PictureError

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
COLOURS = [(0, 0, 0), (255, 255, 255), (200, 30, 60), (10, 120, 240)]
WHITE, RED = [255, 255, 255], [200, 30, 60]


def pixels(image: Image.Image) -> list[list[int]]:
    """The colours, row by row."""
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def coloured() -> Image.Image:
    return Image.fromarray(np.array([COLOURS], np.uint8))


def tiff(bits: int, photometric: int, kind: int, data: bytes, size: tuple[int, int]) -> Any:
    """A TIFF file of one band, without compression."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1,
            278: size[1], 279: len(data), 339: kind}  # fmt: skip
    data += b"\0" * (len(data) % 2)
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return io.BytesIO(head + data + struct.pack("<H", len(tags)) + fields + bytes(4))


def png(depth: int, colour: int, rows: list[bytes], hidden: bytes, width: int) -> Any:
    """A PNG file with a chunk tRNS."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = ((b"IHDR", head), (b"tRNS", hidden), (b"IDAT", content), (b"IEND", b""))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks))


# --- every mode


def lab_of(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D50) of sRGB colours, as 8-bit LAB stores it (a and b as signed bytes)."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
                       [0.0139322, 0.0971045, 0.7141733]])  # fmt: skip
    xyz = linear @ to_xyz.T / (to_xyz.sum(axis=1))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]),
                    200 * (f[..., 1] - f[..., 2])], axis=-1)  # fmt: skip
    return np.stack([lab[..., 0] * 2.55, lab[..., 1], lab[..., 2]], axis=-1)


def in_mode(mode: str) -> tuple[Image.Image, list[list[int]], int]:
    """A picture of this mode, the colours that it shows, and by how much these may differ."""
    grey = [[value] * 3 for value in (0, 255, 85, 170)]
    levels = np.array([[0, 255, 85, 170]], np.uint8)
    colours = [list(colour) for colour in COLOURS]
    if mode in DEEP:
        values = levels.astype(np.float32) / 255 if mode == "F" else levels.astype(np.uint16) * 257
        kinds = {"F": "<f4", "I": "<i4", "I;16B": ">u2"}
        data = values.astype(kinds.get(mode, "<u2")).tobytes()
        return Image.frombytes(mode, (4, 1), data), grey, 0
    if mode == "1":
        return Image.fromarray(levels > 127), [[0] * 3, WHITE, [0] * 3, WHITE], 0
    if mode in ("L", "LA", "La"):
        return Image.fromarray(levels).convert("LA").convert(mode), grey, 0
    if mode == "LAB":
        data = np.rint(lab_of(np.array([COLOURS]) / 255)).astype(np.int16).astype(np.uint8)
        return Image.frombytes("LAB", (4, 1), data.tobytes()), colours, 15  # coarse in the dark
    if mode in ("P", "PA"):
        picture = coloured().quantize(4)
        return picture.convert(mode) if mode == "PA" else picture, colours, 0
    return coloured().convert(mode), colours, 4


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_keeps_what_it_shows(mode: str) -> None:
    image, expected, tolerance = in_mode(mode)
    assert image.mode == mode
    off = np.abs(np.array(pixels(to_rgb(image, "x"))) - np.array(expected))
    assert off.max() <= tolerance
    again = to_rgb(to_rgb(image, "x"), "x")
    assert np.array_equal(pixels(again), pixels(to_rgb(image, "x")))


# --- more than 8 bits


def deep_files() -> dict[str, Any]:
    """Files of a ramp over all values of their depth, from black to white."""
    found: dict[str, Any] = {}
    for kind, mode in (("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I"), ("PPM", "I;16")):
        found[f"{kind} {mode}"] = io.BytesIO()
        image = Image.fromarray(RAMP if mode == "I;16" else RAMP.astype(np.int32))
        image.save(found[f"{kind} {mode}"], kind)
    image = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    found["TIFF I;16B"] = io.BytesIO()
    image.save(found["TIFF I;16B"], "TIFF")
    found["TIFF F"] = io.BytesIO()
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(found["TIFF F"], "TIFF")
    signed = (RAMP // 2).astype("<u2").tobytes()
    found["TIFF of 16 signed bits"] = tiff(16, 1, 2, signed, (256, 256))
    pairs = (RAMP // 16).reshape(-1, 2).astype(np.uint32)  # of 12 bits, in three bytes
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    found["TIFF of 12 bits"] = tiff(12, 1, 1, packed.tobytes(), (256, 256))
    return found


@pytest.mark.parametrize("kind", deep_files())
def test_a_ramp_over_all_values_stays_one(kind: str) -> None:
    """`convert("RGB")` gives a mean of 251 and 2 levels at 16 bits, and black for floats."""
    values = np.asarray(to_rgb(Image.open(deep_files()[kind]), kind))
    assert int(values.mean()) == 127 and len(np.unique(values)) == 256
    assert (np.diff(values[..., 0].flatten().astype(int)) >= 0).all()
    assert values[0, 0].tolist() == [0] * 3 and values[-1, -1].tolist() == WHITE


@pytest.mark.parametrize(("bits", "kind"), [(16, "<u2"), (32, "<f4")])
def test_white_may_be_zero(bits: int, kind: str) -> None:
    values = np.array([0, 1, 0.2] if bits == 32 else [0, 65535, 13107])
    file = tiff(bits, 0, 3 if bits == 32 else 1, values.astype(kind).tobytes(), (3, 1))
    assert pixels(to_rgb(Image.open(file), "x")) == [WHITE, [0] * 3, [204] * 3]


def deep(values: list[float], kind: Any) -> Image.Image:
    return Image.fromarray(np.array([values], kind))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, 0.5, 255], np.float32, r"values from 0 to 255 \(float32\), expected 0 to 1"),
        ([-1, 1], np.float32, r"values from -1 to 1 \(float32\), expected 0 to 1"),
        ([0, np.nan], np.float32, "values from nan to nan"),
        ([0, np.inf], np.float32, "values from 0 to inf"),
        ([0, 65536], np.int32, r"values from 0 to 65536 \(int32\), expected 16-bit values"),
        ([-1, 999], np.int32, "values from -1 to 999"),
        ([0, 255], np.int32, "not all below 256: the value of white is unknown"),
    ],
)
def test_a_range_that_is_unknown_is_an_error_that_names_the_file(
    values: list[float], kind: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.tiff"
    deep(values, kind).save(path)
    listed = ListedPictures([(str(path), 0)], ["a"], tmp_path)
    seeded = SeededPictures(listed, None)
    for read in (lambda: read_rgb(path), lambda: listed[0], lambda: seeded[0]):
        with pytest.raises(PictureError, match=message) as caught:
            read()
        assert str(caught.value).startswith(f"{path} has values")
        assert str(caught.value).endswith("Save it with 8 or 16 bits per value")


def test_rounding_beyond_the_range_is_none() -> None:
    """Values half a level beyond, as resampling leaves them, round to black and white."""
    assert pixels(to_rgb(deep([-0.001, 1.001], np.float32), "x")) == [[0] * 3, WHITE]


# --- transparency


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def palette(alphas: int | bytes) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, 10, 120, 240, 0, 0, 0])
    image.putdata([0, 1, 2])
    return saved(image, "PNG", transparency=alphas)


def over_white() -> dict[str, Callable[[], tuple[Image.Image, list[list[int]]]]]:
    """Pictures with hidden colours, and what they show."""
    blue, black = [10, 120, 240], [0] * 3

    def rgba(mode: str) -> tuple[Image.Image, list[list[int]]]:
        values = np.array([[[*RED, 255], [*RED, 0], [0, 0, 0, 51]]], np.uint8)
        return Image.fromarray(values).convert(mode), [RED, WHITE, [204] * 3]

    def grey(mode: str) -> tuple[Image.Image, list[list[int]]]:
        values = np.array([[[90, 255], [90, 0], [0, 51]]], np.uint8)
        return Image.fromarray(values).convert(mode), [[90] * 3, WHITE, [204] * 3]

    def with_alphas() -> tuple[Image.Image, list[list[int]]]:
        image = coloured().quantize(4).convert("PA")
        image.putalpha(Image.fromarray(np.array([[255, 255, 0, 255]], np.uint8)))
        return image, [black, WHITE, WHITE, blue]

    def l16() -> tuple[Image.Image, list[list[int]]]:
        rows = [struct.pack(">3H", 0, 513, 514)]
        file = png(16, 0, rows, struct.pack(">H", 513), 3)
        return Image.open(file), [black, WHITE, [2] * 3]

    def low(depth: int, row: bytes, hidden: int, shown: list[int]) -> Any:
        file = png(depth, 0, [row], struct.pack(">H", hidden), len(shown))
        return lambda: (Image.open(file), [[value] * 3 for value in shown])

    return {
        "RGBA": lambda: rgba("RGBA"),
        "RGBa": lambda: rgba("RGBa"),
        "WebP": lambda: (saved(rgba("RGBA")[0], "WEBP", lossless=True), rgba("RGBA")[1]),
        "LA": lambda: grey("LA"),
        "La": lambda: grey("La"),
        "PA": with_alphas,
        "P, one colour": lambda: (palette(1), [RED, WHITE, black]),
        "P, alphas": lambda: (palette(bytes([255, 0, 51])), [RED, WHITE, [204] * 3]),
        "L": low(8, bytes([7, 90, 8]), 90, [7, 255, 8]),
        "L of 4 bits": low(4, bytes([0x2A, 0xF0]), 2, [255, 170, 255, 0]),
        "L of 2 bits": low(2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        "1": low(1, bytes([0b01000000]), 0, [255, 255]),
        "I;16": l16,
        "RGB": lambda: (
            Image.open(png(8, 2, [bytes([*RED, *blue])], struct.pack(">3H", *RED), 2)),
            [WHITE, blue],
        ),
        "GIF": lambda: (saved(palette(1), "GIF", transparency=1), [RED, WHITE, black]),
    }


@pytest.mark.parametrize("kind", over_white())
def test_hidden_colours_never_appear(kind: str) -> None:
    """Transparency is over white; what is opaque keeps its colour."""
    image, expected = over_white()[kind]()
    assert np.abs(np.array(pixels(to_rgb(image, kind))) - np.array(expected)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_pictures_lose_nothing(mode: str) -> None:
    image = Image.effect_noise((32, 32), 90).convert(mode)
    assert pixels(to_rgb(image, "x")) == pixels(image.convert("RGB"))


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    """Pillow keeps 8 of the 16 bits, so that other colours would be hidden with it."""
    file = png(16, 2, [struct.pack(">6H", 1, 2, 3, 1, 2, 4)], struct.pack(">3H", 1, 2, 3), 2)
    with pytest.raises(PictureError, match="x has 16 bits per channel and a transparent"):
        to_rgb(Image.open(file), "x")


# --- orientation

TURNED = {  # orientation -> how its pixels are stored, for a picture [[1, 2], [3, 4]] to be seen
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[2, 4], [1, 3]],
    7: [[4, 2], [3, 1]],
    8: [[3, 1], [4, 2]],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_stand_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    levels = np.array(TURNED[orientation], np.uint8).repeat(8, 0).repeat(8, 1)[..., None] * 50
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"x.{kind.lower()}"
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(levels.repeat(3, 2)).save(path, exif=exif, **options)  # type: ignore[arg-type]
    image = read_rgb(path)
    assert np.rint(np.asarray(image)[4::8, 4::8, 0] / 50).tolist() == [[1, 2], [3, 4]]
    assert pixels(to_rgb(image, "x")) == pixels(image)  # not turned again
    listed = SeededPictures(ListedPictures([(str(path), 0)], ["a"], tmp_path), None)
    assert pixels(listed[0][0]) == pixels(image)


def test_damaged_metadata_of_a_good_picture_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"):
        Image.new("RGB", (8, 8), (0, 0, 0)).save(path, exif=exif)
        assert pixels(read_rgb(path)) == [[0, 0, 0]] * 64


# --- other files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP"])
def test_ordinary_pictures_are_as_convert_gives_them(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for mode in ("RGB", "L"):
        path = tmp_path / f"x.{kind.lower()}"
        Image.fromarray(noise).convert(mode).save(path)
        with Image.open(path) as image:
            assert pixels(read_rgb(path)) == pixels(image.convert("RGB"))


def test_cmyk_jpegs_are_inverted_as_adobe_writes_them() -> None:
    image = saved(Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK"), "JPEG", quality=100)
    assert image.mode == "CMYK"
    assert np.abs(np.array(pixels(to_rgb(image, "x"))) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_pictures_the_first_is_taken(kind: str) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ((0, 0, 0), (255, 255, 255)))
    image = saved(first, kind, save_all=True, append_images=[second])
    assert getattr(image, "n_frames", 1) == 2
    assert pixels(to_rgb(image, "x")) == [[0, 0, 0]] * 16


# --- wherever pictures are decoded


class Raw:
    """Pictures as somebody else's data set gives them."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image, 0


def test_a_data_set_of_others_may_give_any_mode() -> None:
    image, _ = SeededPictures(Raw(Image.fromarray(RAMP)), None)[0]
    assert int(np.asarray(image).mean()) == 127
    with pytest.raises(PictureError, match="image 0 of Raw has values from 0 to 255"):
        SeededPictures(Raw(deep([0, 255], np.float32)), None)[0]


def test_rows_of_a_hub_may_have_any_mode() -> None:
    rows = [{"image": Image.fromarray(RAMP), "label": 1}, {"image": None, "label": 0},
            {"image": deep([0, 255], np.float32), "label": 0}]  # fmt: skip
    pictures = HubPictures(rows, "image", "label", (5, 7))
    image, label = pictures[0]
    assert int(np.asarray(image).mean()) == 127 and label == 7
    with pytest.raises(PictureError, match="image 1 of HubPictures is empty"):
        pictures[1]
    with pytest.raises(PictureError, match="image 2 of HubPictures has values"):
        pictures[2]
