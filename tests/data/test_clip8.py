"""The loaders of suite clip8 read small files of the true formats and refuse incomplete ones."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tangent_arithmetic.data.base import Pictures, Splits
from tangent_arithmetic.data.clip8 import CLIP8_SETS, classnames
from tangent_arithmetic.data.clip8.gtsrb import CLASSES as SIGNS
from tangent_arithmetic.data.files import LazyPictures
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.registry import get_dataset
from tangent_arithmetic.data.suites import get_suite
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.miniatures import (
    MAKERS,
    SUN_FOLDERS,
    SYNSETS,
    Patch,
    make_folders,
    make_gtsrb,
    make_imagenet,
    make_mnist,
    make_resisc45,
    picture,
    write,
)


def make_and_load(name: str, root: Path, patch: Patch) -> Splits:
    """Writes the miniature of a data set below `root` and reads it."""
    MAKERS[name](root, patch)
    return CLIP8_SETS[name](root)


def labels(pictures: Pictures) -> list[int]:
    return [pictures[i][1] for i in range(len(pictures))]


def levels(pictures: Pictures) -> list[int]:
    """The grey level of each picture."""
    greys: list[Any] = [pictures[i][0].convert("L").getpixel((0, 0)) for i in range(len(pictures))]
    return greys


def check_contents(splits: Splits, train: Any, test: Any) -> None:
    """Labels and levels of both splits, their types, and that they can be sent to workers."""
    for pictures, expected in ((splits.train, train), (splits.test, test)):
        assert (labels(pictures), levels(pictures)) == expected
        assert labels_of(pictures).tolist() == expected[0]
        assert labels_of(pictures).dtype == np.int64
        image, label = pictures[len(pictures) - 1]
        assert isinstance(image, Image.Image) and type(label) is int
        assert labels(pickle.loads(pickle.dumps(pictures))) == expected[0]


def in_folders(count: int, level: int) -> tuple[list[int], list[int]]:
    """Labels and levels as `make_folders` writes them: one picture a class, two of the first."""
    return [0, *range(count)], [level + 1, *[level] * count]


# name -> (labels, levels) of the training and of the test split, class names by label
CONTENTS: dict[str, tuple[Any, Any, dict[int, str]]] = {
    "Cars": (
        ([13, 195, 0], [0, 10, 20]),
        ([195, 1], [100, 110]),
        {0: "AM General Hummer SUV 2000", 195: "smart fortwo Convertible 2012"},
    ),
    "CIFAR10": (
        ([*range(10)], [*range(10)]),
        ([1, 3, 5], [21, 23, 25]),
        {0: "airplane", 1: "automobile"},
    ),
    "CIFAR100": (
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([5, 6], [5, 6]),
        {0: "apple", 1: "aquarium fish", 99: "worm"},
    ),
    "DTD": (in_folders(47, 40), in_folders(47, 80), {0: "banded", 30: "polka-dotted"}),
    "EuroSAT": (
        in_folders(10, 40),
        in_folders(10, 120),
        {0: "annual crop land", 2: "brushland or shrubland", 9: "lake or sea"},
    ),
    "GTSRB": (
        ([*range(43)], [*range(43)]),
        ([16, 1, 42], [116, 101, 142]),
        {0: SIGNS[0], 14: "stop", 40: "blue circle with white arrows indicating a traffic circle"},
    ),
    "ImageNet": (in_folders(20, 40), in_folders(20, 80), {0: "tench", 999: "toilet paper"}),
    "MNIST": (([5, 0, 4, 1], [50, 0, 40, 10]), ([7, 2], [70, 20]), {0: "0", 9: "9"}),
    "RESISC45": (
        ([0, *range(45)], [20] * 46),
        ([*range(45)], [60] * 45),
        {2: "baseball diamond", 43: "thermal power station", 44: "wetland"},
    ),
    "STL10": (([0, 9, 2], [1, 10, 3]), ([1, 7], [2, 8]), {2: "car", 7: "monkey"}),
    "SUN397": (
        in_folders(397, 40),
        in_folders(397, 80),
        {0: "abbey", 1: "place 000", 396: "youth hostel"},
    ),
    "SVHN": (([1, 9, 0], [1, 9, 10]), ([5, 0], [5, 10]), {0: "0", 9: "9"}),
}


@pytest.mark.parametrize("name", CLIP8_SETS)
def test_labels_pictures_and_class_names(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    splits = make_and_load(name, tmp_path, monkeypatch)
    train, test, phrases = CONTENTS[name]
    check_contents(splits, train, test)
    assert phrases.items() <= dict(enumerate(splits.classnames)).items()
    assert len(splits.classnames) == len(classnames(name))
    if name not in ("Cars", "SUN397"):  # whose miniatures have other classes
        assert splits.classnames == classnames(name)
    if name == "EuroSAT":  # the only one with a validation split
        assert splits.val is not None
        assert (labels(splits.val), levels(splits.val)) == in_folders(10, 80)
    else:
        assert splits.val is None


@pytest.mark.parametrize("name", CLIP8_SETS)
def test_classes_are_known_without_pictures(name: str) -> None:
    phrases, suite = classnames(name), get_suite("clip8")
    counts = {task: entry.num_classes for task, entry in {**suite.tasks, **suite.related}.items()}
    assert len(phrases) == {**counts, "ImageNet": 1000}[name]
    assert len(set(phrases)) == len(phrases) or name == "ImageNet"  # two cranes, two maillots
    assert all(phrase == " ".join(phrase.split()) != "" for phrase in phrases)


def test_order_of_the_longer_class_lists() -> None:
    """Cars as in the developer kit, scenes in the order of their folders, which is not theirs."""
    assert classnames("Cars")[0] == "AM General Hummer SUV 2000"
    assert classnames("Cars")[-1] == "smart fortwo Convertible 2012"
    scenes = classnames("SUN397")
    assert scenes[0] == "abbey" and scenes[-1] == "youth hostel"
    assert scenes.index("waterfall block") + 1 == scenes.index("waterfall fan")
    assert list(classnames("CIFAR100")) == sorted(classnames("CIFAR100"))


def test_imagenet_lists_its_training_pictures_on_first_use(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    make_imagenet(tmp_path, monkeypatch)
    (tmp_path / "imagenet" / "val_in_folder").rename(tmp_path / "imagenet" / "val")
    whole = get_dataset("ImageNet", None, tmp_path)
    for split in ("train", "val"):
        picture(tmp_path / "imagenet" / split / SYNSETS[-1] / "zlate.JPEG", 200)
    assert isinstance(whole.train, LazyPictures) and "listing" not in vars(whole.train)
    val = get_dataset("ImageNetVal", None, tmp_path)
    assert "listing" in vars(whole.train)
    assert (len(whole.train), len(whole.test), len(val.train), len(val.test)) == (22, 21, 20, 2)


# --- refusals

NEEDED = {  # the first path is the one that the message about an empty root names
    "Cars": (
        "stanford_cars/devkit/cars_meta.mat",
        "stanford_cars/devkit/cars_train_annos.mat",
        "stanford_cars/cars_test_annos_withlabels.mat",
        "stanford_cars/cars_test",
    ),
    "CIFAR10": (
        "cifar-10-batches-py/data_batch_1",
        "cifar-10-batches-py/data_batch_3",
        "cifar-10-batches-py/batches.meta",
    ),
    "CIFAR100": ("cifar-100-python/train", "cifar-100-python/test"),
    "DTD": ("dtd/train", "dtd/val"),
    "EuroSAT": ("EuroSAT_splits/train", "EuroSAT_splits/val", "EuroSAT_splits/test"),
    "GTSRB": ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test", "gtsrb/GT-final_test.csv"),
    "ImageNet": ("imagenet/train", "imagenet/val_in_folder"),
    "MNIST": ("MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"),
    "RESISC45": ("resisc45/NWPU-RESISC45", "resisc45/resisc45-test.txt"),
    "STL10": ("stl10/stl10_binary/train_X.bin", "stl10/stl10_binary/test_y.bin"),
    "SUN397": ("sun397/train", "sun397/val"),
    "SVHN": ("svhn/train_32x32.mat", "svhn/test_32x32.mat"),
}


@pytest.mark.parametrize("name", CLIP8_SETS)
def test_a_missing_file_or_folder_is_named(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    first = re.escape(f"data set {name} is not complete: {tmp_path / NEEDED[name][0]} does not")
    with pytest.raises(MissingFileError, match=first):
        CLIP8_SETS[name](tmp_path)
    MAKERS[name](tmp_path, monkeypatch)
    for path in (tmp_path / part for part in NEEDED[name]):
        path.rename(tmp_path / "moved")
        message = re.escape(str(path)).removesuffix("_in_folder")
        with pytest.raises(MissingFileError, match=f"{message}.* does not exist"):
            CLIP8_SETS[name](tmp_path)
        (tmp_path / "moved").rename(path)
    CLIP8_SETS[name](tmp_path)


def test_mnist_still_compressed_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    make_mnist(tmp_path, monkeypatch)
    for path in (tmp_path / "MNIST" / "raw").glob("*-ubyte"):
        path.unlink()
    with pytest.raises(MissingFileError, match=r"gunzip the \.gz files"):
        CLIP8_SETS["MNIST"](tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Cars", "stanford_cars/devkit/cars_train_annos.mat"),
        ("CIFAR10", "cifar-10-batches-py/data_batch_3"),
        ("CIFAR100", "cifar-100-python/meta"),
        ("MNIST", "MNIST/raw/train-images-idx3-ubyte"),
        ("STL10", "stl10/stl10_binary/train_X.bin"),
        ("SVHN", "svhn/test_32x32.mat"),
    ],
)
def test_a_truncated_file_is_refused(
    name: str, file: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: len(content) // 3])
    with pytest.raises(UsageError, match=r"(data set \w+|\.mat) cannot be read .* damaged") as got:
        CLIP8_SETS[name](tmp_path)
    assert "download=True" not in str(got.value)


@pytest.mark.parametrize(
    ("name", "folder", "invalid", "other"),
    [
        ("DTD", "dtd/val/banded", "Banded", "bandy"),
        ("EuroSAT", "EuroSAT_splits/train/SeaLake", "Sea_Lake", None),
        ("GTSRB", "gtsrb/GTSRB/Training/00042", "00043", None),
        ("ImageNet", f"imagenet/val_in_folder/{SYNSETS[0]}", "tench", "n00000001"),
        ("RESISC45", "resisc45/NWPU-RESISC45/wetland", "wetland 2", None),
        ("SUN397", f"sun397/train/{SUN_FOLDERS[0]}", "abbey", "a_abbot"),
    ],
)
def test_class_folders_that_would_shift_labels_are_refused(
    name: str, folder: str, invalid: str, other: str | None, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A missing, an unknown, an empty class, and a class that another split lacks."""
    MAKERS[name](tmp_path, monkeypatch)
    path, parent = tmp_path / folder, re.escape(str((tmp_path / folder).parent))
    count = len(list(path.parent.iterdir()))
    moves = [
        (tmp_path / "moved", rf"expected {count} class folders in {parent}.*got {count - 1}"),
        (path.with_name(invalid), f"not a class: {re.escape(invalid)}"),
    ]
    if other is not None:
        both = ", ".join(sorted((path.name, other)))
        moves.append((path.with_name(other), f"same class folders.*: {both}"))
    for target, message in moves:
        path.rename(target)
        with pytest.raises(UsageError, match=message):
            CLIP8_SETS[name](tmp_path)
        target.rename(path)
    for file in path.iterdir():
        file.unlink()
    with pytest.raises(MissingFileError, match=f"not complete below .*{path.name}"):
        CLIP8_SETS[name](tmp_path)


def test_unsorted_imagenet_validation_pictures_are_refused(tmp_path: Path) -> None:
    """The archive of the validation pictures unpacks to one flat folder."""
    synsets = [f"n{label:08d}" for label in range(1000)]
    make_folders(tmp_path / "imagenet", {"train": 40}, synsets, ".JPEG")
    picture(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG", 9)
    with pytest.raises(UsageError, match=r"expected 1000 class folders in \S+/val, .* got 0"):
        CLIP8_SETS["ImageNet"](tmp_path)


HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
ROWS = [f"0000{i}.ppm;8;8;1;1;6;6;5\n" for i in range(4)]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (HEADER, UsageError, r"GT-final_test.csv lists 0 images, .* holds 3"),
        (HEADER + "".join(ROWS[:2]), UsageError, "lists 2 images, .* holds 3"),
        (HEADER + "".join(ROWS), UsageError, "lists 4 images, .* holds 3"),
        (HEADER + "".join(ROWS[1:]), MissingFileError, r"1 are missing, the first .*00003\.ppm"),
        (HEADER + f"../{ROWS[0]}", UsageError, "which leads out of its folder"),
        (HEADER + f"/etc/{ROWS[0]}", UsageError, "which leads out of its folder"),
        # the archive of the test pictures has a table without labels
        ("Filename;Width\n00000.ppm;8\n", UsageError, "GTSRB cannot be read .* 'ClassId'"),
    ],
)
def test_gtsrb_refuses_a_table_that_does_not_match_its_pictures(
    table: str, error: type[UsageError], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    make_gtsrb(tmp_path, monkeypatch)
    write(tmp_path / "gtsrb" / "GT-final_test.csv", table)
    with pytest.raises(error, match=message):
        CLIP8_SETS["GTSRB"](tmp_path)


def test_resisc45_refuses_a_list_that_does_not_match_its_folders(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    make_resisc45(tmp_path, monkeypatch)
    (tmp_path / "resisc45" / "NWPU-RESISC45" / "airplane" / "airplane_700.jpg").unlink()
    with pytest.raises(MissingFileError, match=r"46 images .*, 1 are .* airplane/airplane_700"):
        CLIP8_SETS["RESISC45"](tmp_path)
    write(tmp_path / "resisc45" / "resisc45-train.txt", "airplane_003.jpg\nairship_001.jpg\n")
    with pytest.raises(UsageError, match=r"resisc45-train\.txt names classes .*: 'airship'"):
        CLIP8_SETS["RESISC45"](tmp_path)


def test_importing_the_loaders_is_light() -> None:
    code = (
        "import sys, tangent_arithmetic.data.clip8; "
        "print([m for m in ('torch', 'torchvision', 'open_clip', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
