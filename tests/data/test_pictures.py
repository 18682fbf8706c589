"""Images of every mode of PIL become RGB with the same appearance, or an error names the file."""

from __future__ import annotations

import io
import struct
import zlib
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
    """The colours of an RGB image, row by row."""
    assert image.mode == "RGB"
    return np.asarray(image).reshape(-1, 3).tolist()


def coloured() -> Image.Image:
    return Image.fromarray(np.array([COLOURS], np.uint8))


def tiff(bits: int, photometric: int, kind: int, data: bytes, size: tuple[int, int]) -> Any:
    """A TIFF file of one band, without compression."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: size[1], 279: len(data), 339: kind}
    data += b"\0" * (len(data) % 2)
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return io.BytesIO(head + data + struct.pack("<H", len(tags)) + fields + bytes(4))


def png(depth: int, colour: int, rows: list[bytes], hidden: bytes, width: int) -> Any:
    """A PNG file with a tRNS chunk."""

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
    x, y = (0.4360747, 0.3850649, 0.1430804), (0.2225045, 0.7168786, 0.0606169)
    to_xyz = np.array([x, y, (0.0139322, 0.0971045, 0.7141733)])
    xyz = linear @ to_xyz.T / (to_xyz.sum(axis=1))
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    fx, fy, fz = np.moveaxis(f, -1, 0)
    return np.stack([2.55 * (116 * fy - 16), 500 * (fx - fy), 200 * (fy - fz)], axis=-1)


def in_mode(mode: str) -> tuple[Image.Image, list[list[int]], int]:
    """An image of this mode, the colours that it shows, and the tolerance of each channel."""
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
def test_every_mode_keeps_its_colours(mode: str) -> None:
    image, expected, tolerance = in_mode(mode)
    assert image.mode == mode
    off = np.abs(np.array(pixels(to_rgb(image, "x"))) - np.array(expected))
    assert off.max() <= tolerance
    again = to_rgb(to_rgb(image, "x"), "x")
    assert np.array_equal(pixels(again), pixels(to_rgb(image, "x")))


# --- more than 8 bits


def deep_files() -> dict[str, Any]:
    """Files of a ramp over all values of their depth, from black to white."""
    big_endian = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    images = {
        "PNG I;16": Image.fromarray(RAMP),
        "TIFF I;16": Image.fromarray(RAMP),
        "TIFF I": Image.fromarray(RAMP.astype(np.int32)),
        "PPM I;16": Image.fromarray(RAMP),
        "TIFF I;16B": big_endian,
        "TIFF F": Image.fromarray((RAMP / 65535).astype(np.float32)),
    }
    files: dict[str, Any] = {name: io.BytesIO() for name in images}
    for name, image in images.items():
        image.save(files[name], name.partition(" ")[0])
    signed = (RAMP // 2).astype("<u2").tobytes()
    files["TIFF of 16 signed bits"] = tiff(16, 1, 2, signed, (256, 256))
    pairs = (RAMP // 16).reshape(-1, 2).astype(np.uint32)  # of 12 bits, in three bytes
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    files["TIFF of 12 bits"] = tiff(12, 1, 1, packed.tobytes(), (256, 256))
    return files


@pytest.mark.parametrize("kind", deep_files())
def test_a_ramp_over_all_values_stays_a_ramp(kind: str) -> None:
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
def test_an_unknown_range_of_values_is_an_error(
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


def test_values_half_a_level_beyond_the_range_are_rounded() -> None:
    """Resampling leaves such values."""
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


def indexed_with_alpha() -> Image.Image:
    image = coloured().quantize(4).convert("PA")
    image.putalpha(Image.fromarray(np.array([[255, 255, 0, 255]], np.uint8)))
    return image


def grey_png(depth: int, row: bytes, hidden: int, width: int) -> Image.Image:
    return Image.open(png(depth, 0, [row], struct.pack(">H", hidden), width))


BLUE = [10, 120, 240]
RGBA = Image.fromarray(np.array([[[*RED, 255], [*RED, 0], [0, 0, 0, 51]]], np.uint8))
LA = Image.fromarray(np.array([[[90, 255], [90, 0], [0, 51]]], np.uint8))
RGB_PNG = png(8, 2, [bytes([*RED, *BLUE])], struct.pack(">3H", *RED), 2)
# images with hidden colours, and their colours over white; one number stands for a grey level
OVER_WHITE: dict[str, tuple[Image.Image, list[Any]]] = {
    "RGBA": (RGBA, [RED, 255, 204]),
    "RGBa": (RGBA.convert("RGBa"), [RED, 255, 204]),
    "WebP": (saved(RGBA, "WEBP", lossless=True), [RED, 255, 204]),
    "LA": (LA, [90, 255, 204]),
    "La": (LA.convert("La"), [90, 255, 204]),
    "PA": (indexed_with_alpha(), [0, 255, 255, BLUE]),
    "P, one colour": (palette(1), [RED, 255, 0]),
    "P, alphas": (palette(bytes([255, 0, 51])), [RED, 255, 204]),
    "L": (grey_png(8, bytes([7, 90, 8]), 90, 3), [7, 255, 8]),
    "L of 4 bits": (grey_png(4, bytes([0x2A, 0xF0]), 2, 4), [255, 170, 255, 0]),
    "L of 2 bits": (grey_png(2, bytes([0b00011011]), 1, 4), [0, 255, 170, 255]),
    "1": (grey_png(1, bytes([0b01000000]), 0, 2), [255, 255]),
    "I;16": (grey_png(16, struct.pack(">3H", 0, 513, 514), 513, 3), [0, 255, 2]),
    "RGB": (Image.open(RGB_PNG), [255, BLUE]),
    "GIF": (saved(palette(1), "GIF", transparency=1), [RED, 255, 0]),
}


@pytest.mark.parametrize(("image", "colours"), OVER_WHITE.values(), ids=OVER_WHITE)
def test_transparent_pixels_become_white(image: Image.Image, colours: list[Any]) -> None:
    """Opaque pixels keep their colour, translucent ones are blended with white."""
    expected = [[one] * 3 if isinstance(one, int) else one for one in colours]
    assert np.abs(np.array(pixels(to_rgb(image, "x"))) - np.array(expected)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_images_are_unchanged(mode: str) -> None:
    image = Image.effect_noise((32, 32), 90).convert(mode)
    assert pixels(to_rgb(image, "x")) == pixels(image.convert("RGB"))


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    """Pillow keeps 8 of the 16 bits, so that other colours would be hidden with it."""
    file = png(16, 2, [struct.pack(">6H", 1, 2, 3, 1, 2, 4)], struct.pack(">3H", 1, 2, 3), 2)
    with pytest.raises(PictureError, match="x has 16 bits per channel and a transparent"):
        to_rgb(Image.open(file), "x")


# --- orientation

# how the pixels of an image [[1, 2], [3, 4]] are stored, for orientation 1 to 8
TURNED = [(1, 2, 3, 4), (2, 1, 4, 3), (4, 3, 2, 1), (3, 4, 1, 2)]
TURNED += [(1, 3, 2, 4), (2, 4, 1, 3), (4, 2, 3, 1), (3, 1, 4, 2)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    stored = np.array(TURNED[orientation - 1], np.uint8).reshape(2, 2)
    levels = stored.repeat(8, 0).repeat(8, 1)[..., None] * 50
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


def test_damaged_metadata_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"):
        Image.new("RGB", (8, 8), (0, 0, 0)).save(path, exif=exif)
        assert pixels(read_rgb(path)) == [[0, 0, 0]] * 64


# --- other files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "PPM", "WEBP"])
def test_ordinary_images_equal_those_of_convert(kind: str, tmp_path: Path) -> None:
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
def test_the_first_frame_is_used(kind: str) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ((0, 0, 0), (255, 255, 255)))
    image = saved(first, kind, save_all=True, append_images=[second])
    assert getattr(image, "n_frames", 1) == 2
    assert pixels(to_rgb(image, "x")) == [[0, 0, 0]] * 16


# --- wherever pictures are decoded


class Raw:
    """A data set of another library."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image, 0


def test_data_sets_of_other_libraries_may_have_any_mode() -> None:
    ramp, unknown = Image.fromarray(RAMP), deep([0, 255], np.float32)
    image, _ = SeededPictures(Raw(ramp), None)[0]
    assert int(np.asarray(image).mean()) == 127
    with pytest.raises(PictureError, match="image 0 of Raw has values from 0 to 255"):
        SeededPictures(Raw(unknown), None)[0]
    rows = [(ramp, 1), (None, 0), (unknown, 0)]
    named = [{"image": image, "label": label} for image, label in rows]
    pictures = HubPictures(named, "image", "label", (5, 7))
    image, label = pictures[0]
    assert int(np.asarray(image).mean()) == 127 and label == 7
    with pytest.raises(PictureError, match="image 1 of HubPictures is empty"):
        pictures[1]
    with pytest.raises(PictureError, match="image 2 of HubPictures has values"):
        pictures[2]
