"""The embedded sets are balanced, reproducible, free of leaks, and rendered once."""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from tangent_arithmetic.data.base import ArrayPictures, Splits
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.embedded.base import SPLITS, EmbeddedSet, Split
from tangent_arithmetic.data.embedded.captions import (
    KINDS,
    OPENINGS,
    SYNONYMS,
    VAGUE,
    VAGUE_IF_RARE,
    caption,
    is_vague,
    plural,
    say,
)
from tangent_arithmetic.data.embedded.drawing import (
    CANVAS,
    COLOURS,
    POOL_FONTS,
    SIZE,
    TASK_FONTS,
    blank,
    contrasting,
    font,
    wobble,
    write,
)
from tangent_arithmetic.data.embedded.landcover import COVERS
from tangent_arithmetic.data.embedded.real import FASHION, mnist_digits, packed
from tangent_arithmetic.data.embedded.rendering import load_embedded
from tangent_arithmetic.data.embedded.textures import TEXTURES
from tangent_arithmetic.data.suites import get_suite

REAL_SIZES: dict[str, dict[str, int | list[int]]] = {  # images per class
    "MNIST": {"train": 320, "val": 50, "test": 100},
    "FashionMNIST": {"train": 480, "val": 50, "test": 100},
    "Emoji": {
        "train": [37, 67, 114, 59, 114, 114, 73, 98, 95],
        "val": [10, 18, 31, 16, 31, 31, 20, 26, 26],
        "test": [18, 33, 57, 29, 57, 57, 36, 49, 47],
    },
}
SYNTHETIC = [name for name in EMBEDDED_SETS if name not in REAL_SIZES]
FULL_SIZES = {name: {"train": 4000, "val": 500, "test": 1000} for name in SYNTHETIC}
FULL_SIZES["Shapes"] = {"train": 1280, "val": 960, "test": 640}


def _recipe(name: str) -> dict[str, Any]:
    """The arguments of a synthetic set's `render_split`: render, num_classes, seed, sizes."""
    return dict(inspect.getclosurevars(EMBEDDED_SETS[name].build).nonlocals)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces synthetic sets to about two images per class."""
    for name in SYNTHETIC:
        recipe = _recipe(name)
        for extra, split in enumerate(SPLITS):
            monkeypatch.setitem(recipe["sizes"], split, 2 * recipe["num_classes"] + extra)
    # sets share a dict of sizes, so what counts is its last value


@pytest.fixture(scope="module")
def real(cache: Path) -> dict[str, Splits]:
    return {name: load_embedded(name, cache) for name in REAL_SIZES}


def _arrays(splits: Splits, split: str) -> ArrayPictures:
    pictures = getattr(splits, split)
    assert isinstance(pictures, ArrayPictures)
    return pictures


def _rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


# --- definitions


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_classes_and_templates_are_valid(name: str) -> None:
    embedded, suite = EMBEDDED_SETS[name], get_suite("embedded")
    known = {**suite.tasks, **suite.related}
    count = 64 if name == suite.control else known[name].num_classes
    assert embedded.name == name
    assert len(set(embedded.classnames)) == len(embedded.classnames) == count
    for prompt, text in zip(embedded.prompts, embedded.templates, strict=True):
        assert text.count("{}") == 1 and prompt("x") == text.replace("{}", "x")


def test_the_suite_has_eight_tasks_a_control_set_and_two_analogous_pairs() -> None:
    suite = get_suite("embedded")
    assert [*EMBEDDED_SETS] == [*suite.tasks, suite.control, *suite.related]
    names = [EMBEDDED_SETS[task].classnames for task in suite.tasks]
    assert len(names) == 8
    assert max(names.count(one) for one in names) == 2  # MNIST and StreetDigits
    letters, digits, street_letters, street_digits = (
        EMBEDDED_SETS[name] for name in ("Letters", "Digits", "StreetLetters", "StreetDigits")
    )
    assert letters.classnames == street_letters.classnames != digits.classnames
    assert digits.classnames == street_digits.classnames
    assert letters.templates == street_letters.templates
    assert digits.templates == street_digits.templates


def test_synthetic_sets_have_their_published_sizes_and_unique_seeds() -> None:
    assert {name: _recipe(name)["sizes"] for name in SYNTHETIC} == FULL_SIZES
    assert len({_recipe(name)["seed"] for name in SYNTHETIC}) == len(SYNTHETIC) == 9


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_splits_are_balanced_and_disjoint(name: str, small: None) -> None:
    embedded, recipe = EMBEDDED_SETS[name], _recipe(name)
    seen: set[bytes] = set()
    total = 0
    for split in SPLITS:
        images, labels = embedded.build(split)
        count, classes = recipe["sizes"][split], len(embedded.classnames)
        assert recipe["num_classes"] == classes
        assert images.shape == (count, SIZE, SIZE, 3) and images.dtype == np.uint8
        assert labels.shape == (count,) and labels.dtype == np.int64
        counts = np.bincount(labels, minlength=classes)
        assert len(counts) == classes and counts.max() - counts.min() <= 1
        assert (images.reshape(count, -1).std(axis=1) > 1).all()  # not empty
        seen |= _rows(images)
        total += count
    assert len(seen) == total  # all images differ, within and across splits


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_images_depend_on_seed_split_and_index_only(name: str, small: None) -> None:
    embedded, recipe = EMBEDDED_SETS[name], _recipe(name)
    images, labels = embedded.build("val")
    np.random.seed(5)  # noqa: NPY002 - the global generator must not matter
    random.seed(5)
    state = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    again, again_labels = embedded.build("val")
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, again_labels)
    assert state == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002
    for index in (0, 3, len(labels) - 1):
        rng = np.random.default_rng((recipe["seed"], SPLITS.index("val"), index))
        alone = recipe["render"](rng, int(labels[index]))
        np.testing.assert_array_equal(alone, images[index])


# --- the real sets


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_splits_are_reproducible(name: str, split: Split, real: dict[str, Splits]) -> None:
    pictures, sizes = _arrays(real[name], split), REAL_SIZES[name][split]
    assert pictures.images.dtype == np.uint8 and pictures.labels.dtype == np.int64
    assert pictures.images.shape == (len(pictures), SIZE, SIZE, 3)
    classes = len(EMBEDDED_SETS[name].classnames)
    expected = sizes if isinstance(sizes, list) else [sizes] * classes
    assert np.bincount(pictures.labels, minlength=classes).tolist() == expected
    image, label = pictures[3]
    assert image.mode == "RGB" and image.size == (SIZE, SIZE) and type(label) is int
    np.testing.assert_array_equal(np.asarray(image), pictures.images[3])
    images, labels = EMBEDDED_SETS[name].build(split)
    np.testing.assert_array_equal(images, pictures.images)
    np.testing.assert_array_equal(labels, pictures.labels)


def test_the_pool_shares_no_image_with_fashion_mnist(real: dict[str, Splits]) -> None:
    pool = _rows(packed("fashion")("pool")[0])
    for split in SPLITS:
        assert pool and not pool & _rows(_arrays(real["FashionMNIST"], split).images)


def _nearest(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Each image's distance to the nearest of the others, relative to its norm."""
    x = images.reshape(len(images), -1).astype(np.float64)
    y = others.reshape(len(others), -1).astype(np.float64)
    squared = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)[None]
    nearest: np.ndarray = np.sqrt(np.maximum(squared.min(1), 0)) / np.linalg.norm(x, axis=1)
    return nearest


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_splits_have_no_near_duplicates(name: str, real: dict[str, Splits]) -> None:
    """Compares the ink: emoji are drawn on white, the other two on black."""
    paper = 255 if name == "Emoji" else 0
    ink = {s: np.abs(paper - _arrays(real[name], s).images.astype(int)) for s in SPLITS}
    assert _nearest(ink["val"][:5], ink["val"]).max() < 1e-6  # the measure detects a duplicate
    for one, other in itertools.combinations(reversed(SPLITS), 2):
        assert _nearest(ink[one], ink[other]).min() >= 0.2, (one, other)


def test_mnist_images_are_centred_grey_and_correctly_labelled(real: dict[str, Splits]) -> None:
    table = {row.tobytes(): label for row, label in zip(*mnist_digits(), strict=True)}
    pictures = _arrays(real["MNIST"], "val")
    for image, label in zip(pictures.images, pictures.labels, strict=True):
        assert (image[..., :1] == image).all()
        assert table[image[2:30, 2:30, 0].tobytes()] == label
        assert not image[:2].any() and not image[30:].any()
        assert not image[:, :2].any() and not image[:, 30:].any()


# --- drawing


def test_tasks_and_pool_use_different_fonts_of_matplotlib() -> None:
    assert not set(POOL_FONTS) & set(TASK_FONTS)
    assert all(font(name, 20).getbbox("A")[2] > 5 for name in (*POOL_FONTS, *TASK_FONTS))


@given(st.sampled_from(sorted(COLOURS)), st.integers(0, 100), st.floats(20, 110))
def test_contrasting_colours_differ_in_luminance(name: str, seed: int, least: float) -> None:
    weights = np.array([0.299, 0.587, 0.114])
    other = contrasting(np.random.default_rng(seed), COLOURS[name], least)
    assert all(0 <= value <= 255 for value in other)
    assert abs(float(weights @ np.array(other)) - float(weights @ np.array(COLOURS[name]))) >= least


def test_wobble_moves_pixels_by_at_most_its_strength() -> None:
    image = blank((255, 255, 255))
    write(image, "8", POOL_FONTS[0], 50, (0, 0, 0))
    still = np.asarray(wobble(np.random.default_rng(0), image, 0.0))
    np.testing.assert_array_equal(still, np.asarray(image))
    dark = np.asarray(image)[..., 0] < 128
    moved = np.asarray(wobble(np.random.default_rng(0), image, 5.0))[..., 0] < 128
    assert 20 < (dark ^ moved).sum() < dark.sum()
    assert not (moved & ~binary_dilation(dark, iterations=11)).any()


def test_an_outline_leaves_the_inside_of_a_character_unchanged() -> None:
    white, red = (255, 255, 255), (255, 0, 0)
    image = blank(white)
    write(image, "I", TASK_FONTS[0], 60, white, outline=red)
    row = np.asarray(image)[CANVAS // 2]
    inked = (row != white).any(axis=1)
    left, right = np.flatnonzero(inked)[[0, -1]]
    assert not inked[(left + right) // 2] and inked[left] and inked[right]


# --- captions


def test_categories_of_vague_captions_never_name_a_class() -> None:
    classes = {*FASHION.classnames, *TEXTURES, *COVERS}
    assert set(KINDS) == classes
    assert not classes & {kind for kinds in KINDS.values() for kind in kinds}


def test_captions_are_vague_at_their_rate_and_use_every_synonym() -> None:
    rng = np.random.default_rng(0)
    for rare, share in ((False, VAGUE), (True, VAGUE_IF_RARE)):
        assert abs(np.mean([is_vague(rng, rare) for _ in range(4000)]) - share) < 0.03
    for word, synonyms in SYNONYMS.items():
        assert word in synonyms
        assert {say(rng, word) for _ in range(100)} == set(synonyms)
    assert say(rng, "stop") == "stop"
    assert plural("cross") == "crosses" and plural("box") == "boxes" and plural("star") == "stars"
    sentences = {caption(rng, "a dog", "a cat") for _ in range(400)}
    assert sentences == {o.format(a) for o in OPENINGS for a in ("a dog", "a cat")}


# --- the cache


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces Emoji by a set of four images; the list receives the splits that are rendered."""
    splits: list[str] = []

    def build(split: Split) -> tuple[np.ndarray, np.ndarray]:
        splits.append(split)
        images = np.full((4, SIZE, SIZE, 3), SPLITS.index(split), dtype=np.uint8)
        return images + np.arange(4, dtype=np.uint8)[:, None, None, None], np.arange(4)

    fake = dataclasses.replace(EMBEDDED_SETS["Emoji"], build=build)
    monkeypatch.setitem(EMBEDDED_SETS, "Emoji", fake)
    return splits


def _assert_intact(splits: Splits) -> None:
    assert splits.classnames == EMBEDDED_SETS["Emoji"].classnames
    for part, split in enumerate(SPLITS):
        pictures = _arrays(splits, split)
        assert pictures.images[:, 0, 0, 0].tolist() == [part, part + 1, part + 2, part + 3]
        assert pictures.labels.tolist() == [0, 1, 2, 3]


def test_images_are_rendered_once_per_version(
    rendered: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        _assert_intact(load_embedded("Emoji", tmp_path))
        assert sorted(rendered) == ["test", "train", "val"]
    files = sorted(path.name for path in (tmp_path / "embedded").iterdir())
    assert files == [f"Emoji-{split}-v1.npz" for split in ("test", "train", "val")]
    newer: EmbeddedSet = dataclasses.replace(EMBEDDED_SETS["Emoji"], version=2)
    monkeypatch.setitem(EMBEDDED_SETS, "Emoji", newer)
    _assert_intact(load_embedded("Emoji", tmp_path))
    assert len(rendered) == 6


Damage = Callable[[bytes], bytes]


def _with(**changes: Any) -> Damage:
    """Replaces arrays of an archive; None removes one."""

    def repack(data: bytes) -> bytes:
        with np.load(io.BytesIO(data)) as arrays:
            held = {**arrays, **changes}
        stream = io.BytesIO()
        np.savez(stream, **{name: value for name, value in held.items() if value is not None})
        return stream.getvalue()

    return repack


DAMAGES: dict[str, Damage] = {
    "empty": lambda data: b"",
    "text": lambda data: b"no archive at all",
    "truncated": lambda data: data[: len(data) // 2],
    "a flipped byte": lambda data: data[:500] + bytes([data[500] ^ 255]) + data[501:],
    "no labels": _with(labels=None),
    "of an earlier version": _with(sources=None),
    "rendered by other code": _with(sources=np.array("0" * 64)),
    "grey": _with(images=np.zeros((4, 32, 32), np.uint8)),
    "fewer images": _with(images=np.zeros((3, 32, 32, 3), np.uint8)),
    "floats": _with(images=np.zeros((4, 32, 32, 3), np.float32)),
    "an unknown class": _with(labels=np.array([0, 1, 2, 99])),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_invalid_cache_is_rendered_again(
    damage: Damage, rendered: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_embedded("Emoji", tmp_path)
    path = tmp_path / "embedded" / "Emoji-val-v1.npz"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level("WARNING", logger="tangent_arithmetic.data.embedded.rendering"):
        _assert_intact(load_embedded("Emoji", tmp_path))
    assert rendered[3:] == ["val"]
    assert "Emoji-val-v1.npz is rendered again" in caplog.text
    with np.load(path) as arrays:
        assert arrays["labels"].tolist() == [0, 1, 2, 3]
