"""Data sets by name, validation splits held out as in the public projects, registration."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import random_split
from torchvision.transforms.functional import pil_to_tensor

from tangent_arithmetic.data import registry as registry_module
from tangent_arithmetic.data import suites, templates
from tangent_arithmetic.data.base import ArrayPictures, Splits, SubsetPictures
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.public import ALL_SETS
from tangent_arithmetic.data.registry import get_dataset, hold_out, known_datasets
from tangent_arithmetic.data.sources import Layout, PublicSet
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.run.models import split_of, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.conftest import MakeArgs

SetDTD = Callable[[Splits], None]


def _splits(train: int, test: int = 3) -> Splits:
    """Unique pictures of one pixel; picture i of a split has label i."""
    numbers = np.arange(train + test, dtype=">u4").view(np.uint8).reshape(-1, 1, 1, 4)[..., 1:]
    parts = (numbers[:train], numbers[train:])
    first, second = (ArrayPictures(images, np.arange(len(images))) for images in parts)
    return Splits(first, second, ("one",))


def _indices(pictures: object) -> list[int]:
    assert isinstance(pictures, SubsetPictures)
    return [int(index) for index in pictures.indices]


# --- validation splits


@given(st.integers(10, 300), st.sampled_from([0.1, 0.25, 0.5]), st.integers(1, 40))
def test_the_held_out_part_is_torch_s_random_split(count: int, fraction: float, most: int) -> None:
    held = min(int(fraction * count), most)
    generator = torch.Generator().manual_seed(0)
    pictures: Any = range(count)
    rest, val = random_split(pictures, [count - held, held], generator)
    splits = hold_out(_splits(count), fraction, most)
    assert _indices(splits.train) == list(rest.indices)
    assert _indices(splits.val) == list(val.indices)


def test_mnist_s_training_part_begins_with_the_published_index() -> None:
    """The public projects assert this number of MNISTVal."""
    splits = hold_out(_splits(60000), 0.1, 5000)
    assert _indices(splits.train)[0] == 36044
    assert (len(splits.train), len(_indices(splits.val))) == (55000, 5000)


def test_a_published_validation_split_is_kept() -> None:
    splits = replace(_splits(10), val=_splits(3).test)
    assert hold_out(splits, 0.1, 5000) is splits


@pytest.fixture
def dtd(monkeypatch: pytest.MonkeyPatch) -> Callable[[Splits], None]:
    """Makes splits the contents of DTD."""
    return lambda splits: monkeypatch.setitem(
        CLIP8_SETS, "DTD", PublicSet(Layout(lambda location: splits, ()))
    )


def test_val_is_held_out_of_the_training_pictures(dtd: SetDTD, tmp_path: Path) -> None:
    dtd(_splits(50, 7))
    whole, val = (get_dataset(name, None, tmp_path) for name in ("DTD", "DTDVal"))
    assert (whole.name, len(whole.train), len(whole.test)) == ("DTD", 50, 7)
    assert (val.name, len(val.train), len(val.test)) == ("DTDVal", 45, 5)
    labels = [[part[i][1] for i in range(len(part))] for part in (val.train, val.test)]
    assert sorted(labels[0] + labels[1]) == list(range(50))
    small = get_dataset("DTDVal", None, tmp_path, val_fraction=0.5, max_val_samples=11)
    assert (len(small.train), len(small.test)) == (39, 11)
    assert val.classnames == whole.classnames == ("one",)


def test_a_small_validation_split_has_an_image(
    dtd: SetDTD, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dtd(_splits(9))
    val = get_dataset("DTDVal", None, tmp_path)
    assert (len(val.train), len(val.test)) == (8, 1)
    assert "0.1 of 9 training images is less than one; one image is for validation" in caplog.text


@pytest.mark.parametrize(
    ("name", "splits", "message"),
    [
        ("DTDVal", _splits(1), r"validation split is empty: there is only one training image"),
        ("DTDVal", replace(_splits(9), val=_splits(9, 0).test), r"validation split is empty\. Add"),
        ("DTDVal", _splits(0), r"training split is empty\. Add images, or leave DTD out"),
        ("DTD", _splits(0), r"training split is empty\."),
        ("DTD", _splits(9, 0), r"test split is empty\."),
    ],
)
def test_an_empty_split_is_named(
    name: str, splits: Splits, message: str, dtd: SetDTD, tmp_path: Path
) -> None:
    dtd(splits)
    with pytest.raises(UsageError, match=f"data set DTD: its {message}"):
        get_dataset(name, None, tmp_path)


def test_an_invalid_size_of_the_validation_split_is_refused(dtd: SetDTD, tmp_path: Path) -> None:
    dtd(_splits(50))
    invalid: list[dict[str, Any]] = [{"val_fraction": v} for v in (0.0, 1.0, -0.1, 1.5, math.nan)]
    for flags in (*invalid, {"max_val_samples": 0}, {"max_val_samples": -3}):
        with pytest.raises(UsageError, match="expected val_fraction between 0 and 1"):
            get_dataset("DTDVal", None, tmp_path, **flags)


def test_embedded_data_sets_have_a_validation_split(tmp_path: Path, cache: Path) -> None:
    whole, val = (
        get_dataset(name, None, tmp_path, suite="embedded", cache_dir=cache)
        for name in ("Emoji", "EmojiVal")
    )
    assert (len(whole.train), len(whole.test)) == (771, 383)
    assert (len(val.train), len(val.test)) == (771, 209)
    np.testing.assert_array_equal(np.asarray(val.train[5][0]), np.asarray(whole.train[5][0]))
    images, labels = EMBEDDED_SETS["Emoji"].build("val")
    np.testing.assert_array_equal(np.asarray(val.test[5][0]), images[5])
    assert val.test[5][1] == labels[5]
    assert val.classnames == EMBEDDED_SETS["Emoji"].classnames


# --- names


def test_unknown_names_list_the_nearest_first(tmp_path: Path) -> None:
    for name, nearest in {"MNISTT": "MNIST, ", "TexturesValVal": "Textures", "Val": ""}.items():
        with pytest.raises(UsageError, match=f"unknown data set '{name}'; choose from {nearest}"):
            get_dataset(name, None, tmp_path)
    with pytest.raises(UsageError, match="unknown data set 'Textures'; choose from ") as error:
        get_dataset("Textures", None, tmp_path, suite="clip8")
    assert "Letters" not in str(error.value) and "RESISC45" in str(error.value)


def test_names_resolve_within_their_suite() -> None:
    embedded, clip8, both = known_datasets("embedded"), known_datasets("clip8"), known_datasets()
    assert set(embedded) == set(EMBEDDED_SETS) and set(embedded.values()) == {"embedded"}
    assert set(clip8) == set(CLIP8_SETS) and set(clip8.values()) == {"clip8"}
    assert set(both) == set(EMBEDDED_SETS) | set(ALL_SETS)
    assert set(embedded) & set(clip8) == {"MNIST"}
    assert (both["MNIST"], both["Emoji"], both["DTD"]) == ("clip8", "embedded", "clip8")


def test_mnist_is_the_public_one_unless_the_suite_is_embedded(tmp_path: Path) -> None:
    for suite in (None, "clip8"):
        with pytest.raises(MissingFileError, match=r"data set MNIST is not complete: .*MNIST"):
            get_dataset("MNIST", None, tmp_path, suite=suite)


def test_a_run_has_the_data_sets_of_its_suite(args: MakeArgs) -> None:
    whole, val = (Run.of(args()).data.dataset(name) for name in ("MNIST", "MNISTVal"))
    assert (whole.name, len(whole.train), len(whole.test)) == ("MNIST", 3200, 1000)
    assert (val.name, len(val.train), len(val.test)) == ("MNISTVal", 3200, 500)
    assert whole.classnames[3] == "three"
    with pytest.raises(UsageError, match="unknown data set of suite embedded 'EuroSATVal'; choose"):
        Run.of(args()).data.dataset("EuroSATVal")
    with pytest.raises(MissingFileError, match=r"data set MNIST is not complete: .*data"):
        Run.of(args(suite="clip8")).data.dataset("MNIST")


# --- registration


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the registrations of a test."""
    monkeypatch.setattr(suites, "SUITES", copy.copy(suites.SUITES))
    monkeypatch.setattr(suites, "DATASETS", {})
    for module in (registry_module, templates):
        monkeypatch.setattr(module, "DATASETS", suites.DATASETS)
    registry_module._load.cache_clear()


def _stripes(location: Path) -> Splits:
    """Horizontal and vertical stripes, in noise that makes every image unique."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 50, (60, 32, 32, 3)).astype(np.uint8)
    images[::2, ::8] += 200
    images[1::2, :, ::8] += 200
    labels = np.arange(60) % 2
    train, test = (ArrayPictures(images[part], labels[part]) for part in (slice(40), slice(40, 60)))
    return Splits(train, test, ("horizontal stripes", "vertical stripes"), source="memory")


STRIPES = ("a {} pattern.", "{}")


def test_a_registered_data_set_is_evaluated_by_name(registry: None, args: MakeArgs) -> None:
    suites.register_dataset("Stripes", _stripes, STRIPES, "embedded", suites.Task(3, 2))
    run = Run.of(args(tasks=["Stripes"], eval_datasets=["Stripes", "StripesVal"]))
    assert run.recipe("Stripes").epochs == 3
    whole, val = (run.data.dataset(name) for name in run.eval_datasets)
    assert (len(whole.train), len(whole.test), len(val.train), len(val.test)) == (40, 20, 36, 4)
    assert whole.source == "memory" and run.data.classnames("StripesVal") == whole.classnames
    assert [t("x") for t in get_templates("StripesVal", "embedded")] == ["a x pattern.", "x"]
    assert known_datasets()["Stripes"] == "embedded"
    encoder, _ = zeroshot_encoder(run)
    for name in run.eval_datasets:
        assert split_of(run, encoder, name).accuracy(encoder)["top1"] > 0.6


def test_a_registered_suite_has_only_its_data_sets(registry: None, tmp_path: Path) -> None:
    own = suites.Suite("mine", {"MNIST": suites.Task(2, 2)}, control="Stripes")
    suites.register_suite(own)
    with pytest.raises(UsageError, match="unknown data set 'MNIST'"):
        get_dataset("MNIST", None, tmp_path, suite="mine")
    for name in own.names:
        suites.register_dataset(name, _stripes, STRIPES, "mine")
    assert suites.get_suite("mine") == own and known_datasets("mine").keys() == set(own.names)
    assert len(get_dataset("MNISTVal", None, tmp_path, suite="mine").test) == 4
    assert known_datasets()["MNIST"] == "clip8"


@pytest.mark.parametrize(
    ("name", "suite", "prompts", "task", "message"),
    [
        ("MNIST", "clip8", STRIPES, None, "data set of suite clip8 'MNIST' is already registered"),
        ("Old", "embedded", STRIPES, None, "data set of suite embedded 'Old' is already"),
        ("New", "embedded", STRIPES, None, r"does not list New; add task=Task\(epochs, num_c"),
        ("New", "none", STRIPES, None, "unknown suite 'none'; choose from "),
        ("NewVal", "clip8", STRIPES, suites.Task(1, 2), "invalid .* 'NewVal': expected letters"),
        ("a/b", "clip8", STRIPES, suites.Task(1, 2), "invalid data set of suite clip8 'a/b'"),
        ("New", "clip8", "a {}", suites.Task(1, 2), "expected templates with one {} each"),
        ("New", "clip8", ("a", "b {}"), suites.Task(1, 2), "expected templates with one {} each"),
    ],
)
def test_invalid_registrations_are_refused(
    registry: None, name: str, suite: str, prompts: Any, task: suites.Task | None, message: str
) -> None:
    suites.register_dataset("Old", _stripes, STRIPES, "embedded", suites.Task(1, 2))
    with pytest.raises(UsageError, match=message):
        suites.register_dataset(name, _stripes, prompts, suite, task)
    with pytest.raises(UsageError, match="suite 'embedded' is already registered"):
        suites.register_suite(suites.get_suite("embedded"))


# --- loaders


def test_loaders_transform_every_picture(tmp_path: Path, cache: Path) -> None:
    data = get_dataset(
        "EmojiVal", pil_to_tensor, tmp_path, batch_size=100, suite="embedded", cache_dir=cache
    )
    sizes = [len(labels) for _, labels in data.test_loader]
    assert sizes == [100, 100, 9]
    images = torch.cat([images for images, _ in data.test_loader])
    expected = EMBEDDED_SETS["Emoji"].build("val")[0].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.numpy(), expected)

    batches = [labels for _, labels in data.train_loader]
    assert [len(labels) for labels in batches] == [100] * 7 + [71]
    labels, own = torch.cat(batches).numpy(), EMBEDDED_SETS["Emoji"].build("train")[1]
    np.testing.assert_array_equal(np.sort(labels), np.sort(own))
    assert not np.array_equal(labels, own)  # shuffled
    assert torch.equal(torch.cat([labels for _, labels in data.train_loader]), torch.cat(batches))
