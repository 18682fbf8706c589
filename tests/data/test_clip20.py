"""The loaders of the sets that clip14 and clip20 add, on small files of the true formats."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from torchvision import datasets as vision

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip20 import (
    CLASSES,
    CLIP20_SETS,
    PUBLIC_SETS,
    classnames,
    tiny_imagenet,
)
from tangent_arithmetic.data.embedded import EMBEDDED_SETS
from tangent_arithmetic.data.hub import match_classes
from tangent_arithmetic.data.identity import pictures_hash, split_ids
from tangent_arithmetic.data.registry import get_classnames, get_dataset, known_datasets
from tangent_arithmetic.data.suites import SUITES, get_suite
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.runtime.errors import MissingFileError, PictureError, UsageError
from tests.data.test_clip8 import check_contents, in_folders, labels, levels
from tests.miniatures import MAKERS, Patch, idx, make_emnist, make_flowers102, make_pcam, write

FOLDERS = {  # of the public projects, and torchvision's; "" where these are the same, or none
    "EMNIST": ("EMNIST", "EMNIST/raw"),
    "EMNISTLetters": ("EMNIST", "EMNIST/raw"),
    "FashionMNIST": ("FashionMNIST", "FashionMNIST/raw"),
    "FER2013": ("", "fer2013"),
    "Flowers102": ("flowers102", "flowers-102"),
    "Food101": ("food101", "food-101"),
    "KMNIST": ("KMNIST", "KMNIST/raw"),
    "OxfordIIITPet": ("OxfordIIITPet", "oxford-iiit-pet"),
    "PCAM": ("PCAM", "pcam"),
    "RenderedSST2": ("RenderedSST2", "rendered-sst2"),
    "TinyImageNet": ("", "tiny-imagenet-200"),
}


def in_order(numbers: list[int], first: int) -> tuple[list[int], list[int]]:
    """Labels, and levels that begin with `first` at label zero."""
    return numbers, [first + number for number in numbers]


FLOWER_LABELS = [7 * n % 102 for n in range(306, 204, -1)], [7 * n % 102 for n in range(102, 0, -1)]
# name -> (labels, levels) of the training and of the test split, class names by label
CONTENTS: dict[str, tuple[Any, Any, dict[int, str]]] = {
    "EMNIST": (([4, 9, 1], [48, 108, 12]), ([0, 7], [0, 84]), {0: "0", 9: "9"}),
    "EMNISTLetters": (([0, 25, 4], [0, 225, 36]), ([2, 1], [18, 9]), {0: "A", 25: "Z"}),
    "FashionMNIST": (
        ([9, 0, 3], [180, 0, 60]),
        ([2, 1], [40, 20]),
        {0: "T-shirt/top", 9: "Ankle boot"},
    ),
    "FER2013": (([0, 6, 3], [0, 6, 3]), ([1, 5, 2], [41, 85, 82]), {3: "happy", 6: "neutral"}),
    "Flowers102": (
        in_order(FLOWER_LABELS[0], 1),
        in_order(FLOWER_LABELS[1], 121),
        {0: "pink primrose", 11: "colt's foot", 92: "air plant", 101: "blackberry lily"},
    ),
    "Food101": (
        ([100, *range(100, -1, -1)], [70, 200, *(50 + i % 40 for i in range(99, -1, -1))]),
        ([*range(100, -1, -1)], [150 + i % 40 for i in range(100, -1, -1)]),
        {0: "apple pie", 16: "cheese plate", 17: "cheesecake", 100: "waffles"},
    ),
    "KMNIST": (([1, 8, 8], [11, 88, 88]), ([0, 9], [0, 99]), {0: "o", 3: "tsu", 9: "wo"}),
    "OxfordIIITPet": (
        in_order([*range(36, -1, -1)], 100),
        in_order([*range(36, -1, -1)], 200),
        {0: "Abyssinian", 1: "American Bulldog", 36: "Yorkshire Terrier"},
    ),
    "PCAM": (([1, 0, 0], [3, 8, 4]), ([1, 0], [21, 30]), {0: "lymph node"}),
    "RenderedSST2": (in_folders(2, 40), in_folders(2, 120), {0: "negative", 1: "positive"}),
    "TinyImageNet": (
        ([0, *range(200)], [0, 250, *(i % 100 for i in range(1, 200))]),
        ([*range(199, -1, -1)], [100 + i % 100 for i in range(199, -1, -1)]),
        {0: "goldfish", 11: "goose", 24: "Chihuahua", 198: "seashore", 199: "acorn"},
    ),
}
VISION: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "Flowers102": (lambda r: vision.Flowers102(r), lambda r: vision.Flowers102(r, "test")),
    "Food101": (lambda r: vision.Food101(r), lambda r: vision.Food101(r, "test")),
    "OxfordIIITPet": (lambda r: vision.OxfordIIITPet(r), lambda r: vision.OxfordIIITPet(r, "test")),
    "PCAM": (lambda r: vision.PCAM(r), lambda r: vision.PCAM(r, "test")),
    "RenderedSST2": (lambda r: vision.RenderedSST2(r), lambda r: vision.RenderedSST2(r, "test")),
}


def make_and_load(name: str, root: Path, patch: Patch) -> Splits:
    """Writes the miniature of a data set below `root` and reads it."""
    MAKERS[name](root, patch)
    return PUBLIC_SETS[name](root)


@pytest.mark.parametrize("name", CLIP20_SETS)
def test_labels_pictures_and_class_names(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    splits = make_and_load(name, tmp_path, monkeypatch)
    train, test, phrases = CONTENTS[name]
    check_contents(splits, train, test)
    assert phrases.items() <= dict(enumerate(splits.classnames)).items()
    assert splits.classnames == classnames(name) and splits.val is None


@pytest.mark.parametrize("name", CLIP20_SETS)
def test_the_layout_of_torchvision_is_read_too(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    parent, inner = FOLDERS[name]
    MAKERS[name](tmp_path, monkeypatch)
    ours = get_dataset(name, None, tmp_path, suite="clip20")
    theirs = get_dataset(name, None, tmp_path / parent, suite="clip20")
    assert (tmp_path / parent / inner).exists()
    assert ours.source == "folder" and theirs.source == ("torchvision" if parent else "folder")
    assert split_ids(ours.train) == split_ids(theirs.train) is not None
    assert labels(ours.test) == labels(theirs.test)


@pytest.mark.parametrize("name", VISION)
def test_order_and_labels_are_those_of_torchvision(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The published validation split depends on the order of the training images."""
    splits = make_and_load(name, tmp_path, monkeypatch)
    files = vision.Flowers102._file_dict
    folder = tmp_path / "flowers102" / "flowers-102"
    changed = {k: (f, None) for k, (f, _) in files.items()}  # no published checksums
    monkeypatch.setattr(vision.Flowers102, "_file_dict", changed)
    assert name != "Flowers102" or (folder / "setid.mat").exists()
    for ours, read in zip((splits.train, splits.test), VISION[name], strict=True):
        theirs = read(tmp_path / FOLDERS[name][0])
        assert labels(ours) == [label for _, label in theirs]
        assert levels(ours) == [image.convert("L").getpixel((0, 0)) for image, _ in theirs]


def test_class_names_are_those_of_torchvision(tmp_path: Path, monkeypatch: Patch) -> None:
    assert list(CLASSES["FashionMNIST"]) == vision.FashionMNIST.classes
    assert list(CLASSES["KMNIST"]) == vision.KMNIST.classes
    letters = vision.EMNIST.classes_split_dict["letters"][1:]
    assert [name.lower() for name in CLASSES["EMNISTLetters"]] == letters
    hub = CLIP20_SETS["Flowers102"].hub
    assert hub is not None
    assert match_classes("Flowers102", hub, vision.Flowers102.classes) == tuple(range(102))
    MAKERS["OxfordIIITPet"](tmp_path, monkeypatch)
    pets = vision.OxfordIIITPet(tmp_path / "OxfordIIITPet")
    assert list(CLASSES["OxfordIIITPet"]) == pets.classes
    dishes = [name.replace(" ", "_") for name in CLASSES["Food101"]]
    assert dishes == sorted(dishes)


def test_class_names_of_tiny_imagenet_are_the_first_words_of_their_synsets() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    first = {s: info.label_name_to_description(s).partition(",")[0] for s in tiny_imagenet.NAMES}
    assert first == tiny_imagenet.NAMES
    assert [*first] == sorted(set(info.label_names()) & set(first)) and len(first) == 200


def test_the_pictures_of_emnist_are_upright(tmp_path: Path, monkeypatch: Patch) -> None:
    """A seven: a bar at the top and one at the right, whose rows and columns the file exchanges."""
    make_emnist(tmp_path, monkeypatch)
    seven = np.zeros((28, 28), np.uint8)
    seven[3, 5:20] = seven[3:24, 19] = 255
    file = "emnist-digits-train-images-idx3-ubyte"
    write(tmp_path / "EMNIST" / "EMNIST" / "raw" / file, idx(np.stack([seven.T] * 3)))
    splits = PUBLIC_SETS["EMNIST"](tmp_path)
    np.testing.assert_array_equal(np.asarray(splits.train[0][0]), seven)


def test_both_tables_of_fer2013_are_read(tmp_path: Path, monkeypatch: Patch) -> None:
    splits = make_and_load("FER2013", tmp_path, monkeypatch)
    table = tmp_path / "fer2013" / "fer2013.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    lines = ["emotion, Usage, pixels", *(f"{n},{usage},{pixels}" for n, pixels, usage in rows)]
    table.unlink()
    write(table.with_name("icml_face_data.csv"), "\n".join(lines) + "\n")
    known = {**vision.FER2013._RESOURCES, "icml": ("icml_face_data.csv", None)}
    monkeypatch.setattr(vision.FER2013, "_RESOURCES", known)
    again = PUBLIC_SETS["FER2013"](tmp_path)
    assert pictures_hash(again.train) == pictures_hash(splits.train)
    assert labels(again.test) == [1, 5, 2]


# --- refusals

NEEDED = {  # the first path is the one that the message about an empty root names
    "EMNIST": ("emnist-digits-train-images-idx3-ubyte", "emnist-digits-test-labels-idx1-ubyte"),
    "EMNISTLetters": (
        "emnist-letters-train-images-idx3-ubyte",
        "emnist-letters-test-labels-idx1-ubyte",
    ),
    "FashionMNIST": ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    "FER2013": ("fer2013.csv",),
    "Flowers102": ("jpg", "imagelabels.mat", "setid.mat"),
    "Food101": ("images", "meta/train.json", "meta/test.json"),
    "KMNIST": ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    "OxfordIIITPet": ("images", "annotations/trainval.txt", "annotations/test.txt"),
    "PCAM": ("camelyonpatch_level_2_split_train_x.h5", "camelyonpatch_level_2_split_test_y.h5"),
    "RenderedSST2": ("train", "test"),
    "TinyImageNet": ("train", "val/val_annotations.txt"),
}


@pytest.mark.parametrize("name", CLIP20_SETS)
def test_a_missing_file_or_folder_is_named(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    folder = tmp_path.joinpath(*FOLDERS[name])
    first = re.escape(f"data set {name} is not complete: {folder / NEEDED[name][0]} does not")
    with pytest.raises(MissingFileError, match=first):
        PUBLIC_SETS[name](tmp_path)
    MAKERS[name](tmp_path, monkeypatch)
    for path in (folder / part for part in NEEDED[name]):
        path.rename(tmp_path / "moved")
        with pytest.raises(MissingFileError, match=rf"{re.escape(str(path))}.* does not exist"):
            PUBLIC_SETS[name](tmp_path)
        (tmp_path / "moved").rename(path)
    PUBLIC_SETS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("EMNIST", "emnist-digits-train-images-idx3-ubyte"),
        ("EMNISTLetters", "emnist-letters-test-images-idx3-ubyte"),
        ("FashionMNIST", "t10k-images-idx3-ubyte"),
        ("FER2013", "fer2013.csv"),
        ("Flowers102", "setid.mat"),
        ("Flowers102", "imagelabels.mat"),
        ("Food101", "meta/test.json"),
        ("KMNIST", "train-images-idx3-ubyte"),
        ("OxfordIIITPet", "annotations/test.txt"),
        ("PCAM", "camelyonpatch_level_2_split_train_x.h5"),
        ("PCAM", "camelyonpatch_level_2_split_test_y.h5"),
        ("TinyImageNet", "val/val_annotations.txt"),
    ],
)
def test_a_truncated_file_is_refused(
    name: str, file: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    path = tmp_path.joinpath(*FOLDERS[name], file)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(UsageError, match=r"cannot be read|no images of the classes"):
        PUBLIC_SETS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("Flowers102", "jpg/image_00306.jpg"),
        ("Food101", "images/waffles/7.jpg"),
        ("OxfordIIITPet", "images/pug_1.jpg"),
        ("TinyImageNet", "val/images/val_7.JPEG"),
    ],
)
def test_a_listed_picture_that_is_missing_is_named(
    name: str, picture: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    path = tmp_path.joinpath(*FOLDERS[name], picture)
    path.unlink()
    with pytest.raises(MissingFileError, match=rf"1 are missing, the first {re.escape(str(path))}"):
        PUBLIC_SETS[name](tmp_path)


def replace_once(table: Path, old: str, new: str) -> None:
    """Replaces a text that a file has once."""
    text = table.read_text()
    assert text.count(old) == 1
    table.write_text(text.replace(old, new))


LINES = {
    "pug_1 25 2 1": "pug_1 has the class 25, which is not its breed",
    "pug_1 99 2 1": "has the class 99",
    "pug_1 0 2 1": "has the class 0",
    "pug_1 26": "not enough values",
    "pug_1 x 2 1": "invalid literal",
    "../pug_1 26 2 1": "not its breed",
    "/pug_1 26 2 1": "not its breed",
}


@pytest.mark.parametrize("line", LINES)
def test_a_damaged_list_of_pets_is_refused(line: str, tmp_path: Path, monkeypatch: Patch) -> None:
    MAKERS["OxfordIIITPet"](tmp_path, monkeypatch)
    table = tmp_path.joinpath(*FOLDERS["OxfordIIITPet"], "annotations", "trainval.txt")
    replace_once(table, "pug_1 26 2 1", line)
    with pytest.raises(UsageError, match=rf"OxfordIIITPet cannot be read from .*{LINES[line]}"):
        PUBLIC_SETS["OxfordIIITPet"](tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('"waffles":', '"wafers":', UsageError, "must list the 101 folders .*: waffles, wafers|wa"),
        ('"waffles/150"', '"../../x"', UsageError, "which leads out of its folder"),
        ('["waffles/150"]', "7", UsageError, "Food101 cannot be read from"),
        ('["waffles/150"]', "[]", MissingFileError, "no images of the classes waffles"),
    ],
)
def test_a_list_of_food_that_does_not_match_its_folders_is_refused(
    old: str, new: str, error: type[UsageError], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["Food101"](tmp_path, monkeypatch)
    replace_once(tmp_path.joinpath(*FOLDERS["Food101"], "meta", "test.json"), old, new)
    with pytest.raises(error, match=message):
        PUBLIC_SETS["Food101"](tmp_path)


@pytest.mark.parametrize(
    ("variable", "values"), [("trnid", [0]), ("trnid", [307]), ("labels", [103]), ("labels", [0])]
)
def test_numbers_of_flowers_out_of_range_are_refused(
    variable: str, values: list[int], tmp_path: Path, monkeypatch: Patch
) -> None:
    make_flowers102(tmp_path, monkeypatch)
    folder = tmp_path.joinpath(*FOLDERS["Flowers102"])
    path = folder / ("imagelabels.mat" if variable == "labels" else "setid.mat")
    table = {k: v for k, v in scipy.io.loadmat(path).items() if not k.startswith("__")}
    table[variable][0, 0] = values[0]
    scipy.io.savemat(path, table)
    with pytest.raises(UsageError, match=rf"number 306 images and 102 classes, got {values[0]};"):
        PUBLIC_SETS["Flowers102"](tmp_path)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("val_5.JPEG\tn01742173\t0\t0\t7\t7\n", UsageError, "val_5.JPEG has the synset n01742173,"),
        ("val_5.JPEG\n", UsageError, "TinyImageNet cannot be read from .*not enough values"),
        ("../val_5.JPEG\tn01742172\n", UsageError, "which leads out of its folder"),
        ("/val_5.JPEG\tn01742172\n", UsageError, "which leads out of its folder"),
        ("val_999.JPEG\tn01742172\n", MissingFileError, "1 are missing, the first .*val_999.JPEG"),
        ("", MissingFileError, "no images of the classes n01742172 in .*val"),
    ],
)
def test_a_damaged_list_of_tiny_imagenet_is_refused(
    line: str, error: type[UsageError], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["TinyImageNet"](tmp_path, monkeypatch)
    table = tmp_path.joinpath(*FOLDERS["TinyImageNet"], "val", "val_annotations.txt")
    replace_once(table, "val_5.JPEG\tn01742172\t0\t0\t7\t7\n", line)
    with pytest.raises(error, match=message):
        PUBLIC_SETS["TinyImageNet"](tmp_path)


@pytest.mark.parametrize(
    ("moved", "place", "error", "message"),
    [
        ("n01443537", "n01443538", UsageError, "got 200, of which not a class: n01443538"),
        ("n01443537", "../moved", UsageError, "expected 200 class folders in .*train, .*; got 199"),
        ("n01443537/images", "../moved", MissingFileError, "no images of the classes n01443537"),
    ],
)
def test_other_training_folders_of_tiny_imagenet_are_refused(
    moved: str,
    place: str,
    error: type[UsageError],
    message: str,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    MAKERS["TinyImageNet"](tmp_path, monkeypatch)
    train = tmp_path / "tiny-imagenet-200" / "train"
    (train / moved).rename(train / place)
    with pytest.raises(error, match=message):
        PUBLIC_SETS["TinyImageNet"](tmp_path)


@pytest.mark.parametrize("missing", ["negative", "positive"])
def test_a_class_of_reviews_that_is_missing_is_refused(
    missing: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["RenderedSST2"](tmp_path, monkeypatch)
    folder = tmp_path.joinpath(*FOLDERS["RenderedSST2"], "test")
    (folder / missing).rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"expected 2 class folders in .*test, .*got 1"):
        PUBLIC_SETS["RenderedSST2"](tmp_path)


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        ("x", np.zeros((3, 32, 32, 3), np.uint8), r"images of shape \(32, 32, 3\)"),
        ("x", np.zeros((3, 96, 96, 3), np.float32), "type float32"),
        ("x", np.zeros((4, 96, 96, 3), np.uint8), r"shape \(3, 1, 1, 1\) for 4 images"),
        ("y", np.zeros((3,), np.uint8), r"shape \(3,\) for 3 images"),
    ],
)
def test_files_of_pcam_that_do_not_match_are_refused(
    kind: str, array: np.ndarray, message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    make_pcam(tmp_path, monkeypatch)
    import h5py

    name = f"camelyonpatch_level_2_split_train_{kind}.h5"
    with h5py.File(tmp_path / "PCAM" / "pcam" / name, "w") as file:
        file[kind] = array
    with pytest.raises(UsageError, match=rf"PCAM cannot be read from .*{message}"):
        PUBLIC_SETS["PCAM"](tmp_path)


def test_a_picture_of_pcam_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    splits = make_and_load("PCAM", tmp_path, monkeypatch)
    with pytest.raises(IndexError):
        splits.train[3]
    (tmp_path / "PCAM" / "pcam" / "camelyonpatch_level_2_split_train_x.h5").write_bytes(b"x" * 99)
    with pytest.raises(PictureError, match=r"image 1 of .*train_x\.h5 cannot be read .* damaged"):
        splits.train[1]


def test_pcam_without_h5py_names_the_extra(tmp_path: Path, monkeypatch: Patch) -> None:
    for file in NEEDED["PCAM"]:
        write(tmp_path / "PCAM" / "pcam" / file, b"")
    for file in ("train_y", "test_x"):
        write(tmp_path / "PCAM" / "pcam" / f"camelyonpatch_level_2_split_{file}.h5", b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r'needs the package h5py, .* pip install -e "\.\[pcam\]"'):
        PUBLIC_SETS["PCAM"](tmp_path)


# --- suites


@pytest.mark.parametrize(("suite", "count"), [("clip8", 8), ("clip14", 14), ("clip20", 20)])
def test_the_tables_of_the_suites_are_complete(suite: str, count: int) -> None:
    entry = get_suite(suite)
    assert len(entry.tasks) == count and entry.control == "ImageNet"
    for name, task in {**entry.tasks, **entry.related}.items():
        assert task.num_classes == len(classnames(name)) == len(set(classnames(name)))
        assert task.epochs is not None and task.epochs >= 1
        prompts = [template("<class>") for template in get_templates(f"{name}Val", suite)]
        assert prompts and all(prompt.count("<class>") == 1 for prompt in prompts)
        assert get_classnames(name, "nowhere", suite) == classnames(name)
    assert len(get_templates("ImageNet", suite)) == 80
    assert set(known_datasets(suite)) == set(entry.names) <= set(PUBLIC_SETS)


def test_a_suite_extends_the_smaller_one_and_has_its_recipe() -> None:
    eight, fourteen, twenty = (SUITES[f"clip{n}"] for n in (8, 14, 20))
    assert [*eight.tasks] == [*fourteen.tasks][:8] and [*fourteen.tasks] == [*twenty.tasks][:14]
    assert eight.tasks.items() <= fourteen.tasks.items() <= twenty.tasks.items()
    assert eight.related.items() <= twenty.tasks.items()
    for suite in (fourteen, twenty):
        assert (suite.lr, suite.warmup_length, suite.batch_size, suite.num_grad_accumulation) == (
            (eight.lr, eight.warmup_length, eight.batch_size, eight.num_grad_accumulation)
        )
    assert set(twenty.names) == set(PUBLIC_SETS)


def test_fashion_mnist_is_the_public_one_in_its_suite_only(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["FashionMNIST"](tmp_path, monkeypatch)
    public = get_dataset("FashionMNIST", None, tmp_path, suite="clip20")
    assert labels(public.train) == [9, 0, 3] and public.classnames == CLASSES["FashionMNIST"]
    ours = get_classnames("FashionMNIST", tmp_path, "embedded")
    assert ours == EMBEDDED_SETS["FashionMNIST"].classnames
    assert known_datasets()["FashionMNIST"] == "embedded"
    assert known_datasets()["KMNIST"] == "clip20" and known_datasets()["PCAM"] == "clip14"
    with pytest.raises(UsageError, match="unknown data set 'KMNIST'; choose from "):
        get_dataset("KMNIST", None, tmp_path, suite="clip14")


def test_validation_splits_follow_the_published_rule(tmp_path: Path, monkeypatch: Patch) -> None:
    """A tenth of the training images by `random_split` with seed 0, as for clip8."""
    import torch

    MAKERS["Food101"](tmp_path, monkeypatch)
    whole, val = (
        get_dataset(name, None, tmp_path, suite="clip20") for name in ("Food101", "Food101Val")
    )
    seed = torch.Generator().manual_seed(0)
    images: Any = range(102)
    parts: Any = torch.utils.data.random_split(images, [92, 10], seed)
    for pictures, part in zip((val.train, val.test), parts, strict=True):
        assert labels(pictures) == [labels(whole.train)[i] for i in part.indices]


def test_importing_the_loaders_is_light() -> None:
    code = (
        "import sys, tangent_arithmetic.data.clip20; "
        "heavy = ('torch', 'torchvision', 'open_clip', 'scipy', 'h5py', 'datasets'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
