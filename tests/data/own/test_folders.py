"""Own data in folders: layouts, class names, the test part, odd sets."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.files import ListedPictures
from tangent_arithmetic.data.identity import labels_of, split_ids
from tangent_arithmetic.data.leaks import refuse_shared
from tangent_arithmetic.data.own.folders import FolderSource
from tangent_arithmetic.data.registry import hold_out
from tangent_arithmetic.data.splitting import copies_of, split_off
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.data.own.conftest import Fill, picture

HERE = Path()


def _counts(pictures: Any) -> dict[int, int]:
    return dict(sorted(Counter(labels_of(pictures).tolist()).items()))


def _read(root: Path, **options: Any) -> Splits:
    return refuse_shared(FolderSource("mine", root, **options)(HERE))


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        (("train", "val", "test"), (6, 4, 4)),
        (("train", "test"), (6, None, 4)),
        (("training", "validation"), (6, None, 4)),  # as ImageNet: val is for testing
        (("Train", "Test"), (6, None, 4)),
        (("training_set", "Test-Set"), (6, None, 4)),
        (("train", "eval"), (6, None, 4)),
    ],
)
def test_layouts_with_splits(
    folders: tuple[str, ...], sizes: tuple[int | None, ...], fill: Fill, tmp_path: Path
) -> None:
    for i, folder in enumerate(folders):
        fill(tmp_path / folder, {"big_cat": 2 if i else 3, "dog": 2 if i else 3})
    splits = _read(tmp_path)
    parts = (splits.train, splits.val, splits.test)
    assert tuple(None if part is None else len(part) for part in parts) == sizes
    assert splits.classnames == ("big cat", "dog") and not splits.multilabel
    assert _counts(splits.train) == {0: 3, 1: 3}


@pytest.mark.parametrize(
    ("classes", "tested"),
    [
        ({"a": 10, "b": 5}, {0: 2, 1: 1}),
        ({"a": 2, "b": 1}, {0: 1}),  # a class with one picture is for training
        ({"a": 13, "b": 12}, {0: 3, 1: 2}),  # rounded
        ({"only": 6}, {0: 1}),
        ({"train": 3, "plane": 3}, {0: 1, 1: 1}),  # train is a class here
    ],
)
def test_a_folder_without_splits_is_split(
    classes: Mapping[str, int], tested: dict[int, int], fill: Fill, tmp_path: Path
) -> None:
    splits = _read(fill(tmp_path, classes))
    assert _counts(splits.test) == tested
    sizes = [classes[name] for name in sorted(classes)]
    rest = {k: n - tested.get(k, 0) for k, n in enumerate(sizes)}
    assert _counts(splits.train) == rest


def test_the_test_part_depends_on_names_alone(
    fill: Fill, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = fill(tmp_path / "one", {"a": 20, "b": 9})
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "two")
    one, two = _read(root), _read(moved)
    assert split_ids(one.test) == split_ids(two.test)
    assert "a fifth of each class is for testing: 23 training and 6 test examples" in caplog.text
    picture(root / "b" / "zz.png")  # one more picture moves few others
    more = {str(one.test.pictures.samples[i][0]) for i in one.test.indices}  # type: ignore[attr-defined]
    grown = _read(root).test
    assert len(more & {str(grown.pictures.samples[i][0]) for i in grown.indices}) >= 5  # type: ignore[attr-defined]


def test_the_split_rule_is_the_documented_one() -> None:
    keys = [f"a/{i}.png" for i in range(10)]
    train, test = split_off(keys, ["a"] * 10)
    assert test == [0, 8] and train == [1, 2, 3, 4, 5, 6, 7, 9]  # by SHA-256, on every machine


def test_testing_may_lack_classes_but_not_have_more(fill: Fill, tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3, "c": 1})
    fill(tmp_path / "test", {"c": 2})
    assert _counts(_read(tmp_path).test) == {2: 2}
    fill(tmp_path / "test", {"d": 1})
    with pytest.raises(UsageError, match=r"test has classes that the training images lack: d"):
        _read(tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a cat\n# comment\n\na dog\n", ("a cat", "a dog")),
        ("dog\tthe dog\ncat\tthe cat\n", ("the cat", "the dog")),
    ],
)
def test_class_names_from_a_file(
    text: str, names: tuple[str, ...], fill: Fill, tmp_path: Path
) -> None:
    root = fill(tmp_path / "data", {"cat": 3, "dog": 3})
    (root / "classnames.txt").write_text(text)
    assert _read(root).classnames == FolderSource("mine", root).classnames(HERE) == names
    other = tmp_path / "other.txt"
    other.write_text("x\ny\n")
    assert _read(root, names=other).classnames == ("x", "y")
    assert _read(root, names=("u", "v")).classnames == ("u", "v")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n", r"expected 2 class names, one a line in the order of cat, dog; got 1"),
        ("cat\ta\nbird\tb\n", r"without a phrase: dog; no class of the data: bird"),
        ("cat\ta\ncat\tb\n", r"expected one line CLASS<TAB>PHRASE for each of the 2 classes"),
    ],
)
def test_wrong_class_names_are_refused(text: str, message: str, fill: Fill, tmp_path: Path) -> None:
    root = fill(tmp_path, {"cat": 3, "dog": 3})
    (root / "classnames.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        _read(root)


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (("hot dog", "hot_dog"), None),
        (("caf\u00e9", "cafe\u0301"), None),
        (("cat", "dog"), "a pet\na  pet\n"),
    ],
)
def test_classes_of_the_same_name_are_refused(
    classes: tuple[str, str], text: str | None, fill: Fill, tmp_path: Path
) -> None:
    root = fill(tmp_path / "data", dict.fromkeys(classes, 3))
    if text is not None:
        (root / "classnames.txt").write_text(text)
    with pytest.raises(UsageError, match=r"'.*', '.*' have the same name .*classnames\.txt"):
        _read(root)
    assert _read(root, names=("one", "other")).classnames == ("one", "other")
    with pytest.raises(UsageError, match=r"have the same name 'one'"):
        _read(root, names=("one", "one"))


@pytest.mark.parametrize(
    ("folders", "error", "message"),
    [
        ({}, MissingFileError, "has no folders; expected one folder of images per class"),
        ({"a": 0, "b": 3}, MissingFileError, "no images of the classes a"),
        ({"a": 1, "b": 1}, UsageError, "at most one .* of each class, cannot be split"),
        ({"test/a": 2}, UsageError, "expected a split train beside test"),
        ({"train/a": 2, "training/a": 2}, UsageError, "train and training are both its train"),
        (
            {"my train/cat": 2, "my train/dog": 2, "held/cat": 2, "held/dog": 2},
            UsageError,
            "the folders held, my train of .* have the same folders in them; expected classes",
        ),
    ],
)
def test_folders_that_are_no_data_set(
    folders: Mapping[str, int], error: type[Exception], message: str, fill: Fill, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        _read(fill(tmp_path, folders))


def test_an_image_in_two_splits_is_refused(fill: Fill, tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3})
    (tmp_path / "test" / "a").mkdir(parents=True)
    shutil.copy(tmp_path / "train" / "a" / "a000.png", tmp_path / "test" / "a")
    with pytest.raises(UsageError, match="are the same image in two splits"):
        _read(tmp_path)


def test_a_file_that_is_there_twice_is_for_training(
    fill: Fill, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = fill(tmp_path, {"a": 10, "b": 10})
    tested = split_ids(_read(root).test) or []
    for i, name in enumerate(tested):
        shutil.copy(root / name, root / "b" / f"copy{i}.png")
    splits = _read(root)
    assert len(splits.test) == 5 and not set(tested) & set(split_ids(splits.test) or ())
    assert "8 examples have the content of another one, such as a/" in caplog.text


def test_files_that_cannot_be_read_are_no_copies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    samples = [(str(tmp_path / name), 0) for name in ("a", "b")]
    assert copies_of(ListedPictures(samples, ["one"], tmp_path)) == set()


def test_pictures_beside_the_splits_are_left_out_with_a_warning(
    fill: Fill, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, {"train/steam": 5, "train/diesel": 5, "test": 2, "to predict": 3})
    splits = _read(tmp_path)
    assert splits.classnames == ("diesel", "steam") and len(splits.train) + len(splits.test) == 10
    assert "the pictures in test, to predict, beside its splits, are left out" in caplog.text


def test_classes_may_have_folders_of_like_names(fill: Fill, tmp_path: Path) -> None:
    fill(tmp_path, {f"{pet}/{place}": 4 for pet in ("cat", "dog") for place in ("in", "out")})
    splits = _read(tmp_path)
    assert splits.classnames == ("cat", "dog") and len(splits.train) + len(splits.test) == 16


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_are_rgb(mode: str, tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for i in range(4):
        path = tmp_path / "a" / f"{i}{'.tif' if mode in ('CMYK', 'I;16') else '.png'}"
        path.parent.mkdir(exist_ok=True)
        if mode == "I;16":
            Image.fromarray(values.astype(np.uint16) * 257 + i).save(path)
        else:
            Image.fromarray((values + i).astype(np.uint8)).convert(mode).save(path)
    splits = _read(tmp_path)
    assert {splits.train[i][0].mode for i in range(len(splits.train))} == {"RGB"}


@pytest.mark.parametrize(("images", "held"), [(2, 1), (9, 1), (10, 1), (25, 2)])
def test_a_validation_split_is_never_empty(
    images: int, held: int, fill: Fill, tmp_path: Path
) -> None:
    fill(tmp_path / "train", {"a": images})
    fill(tmp_path / "test", {"a": 1})
    splits = hold_out(_read(tmp_path), 0.1, 5000)
    assert splits.val is not None and (len(splits.train), len(splits.val)) == (images - held, held)


def test_a_thousand_classes(tmp_path: Path) -> None:
    for name in range(1000):
        (tmp_path / str(name)).mkdir()
        for i in range(2):
            pixels = bytes(divmod(2 * name + i, 256))
            (tmp_path / str(name) / f"{name}_{i}.pgm").write_bytes(b"P5 2 1 255\n" + pixels)
    splits = FolderSource("many", tmp_path)(HERE)
    assert len(splits.classnames) == 1000 == len(splits.test) == len(splits.train)
    assert splits.test[7][0].size == (2, 1)
