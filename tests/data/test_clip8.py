"""The loaders of the CLIP suite read small files of the true formats, refuse incomplete ones."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tangent_arithmetic.data.base import Pictures, Splits
from tangent_arithmetic.data.clip8 import CLIP8_SETS, classnames
from tangent_arithmetic.data.clip8.gtsrb import CLASSES as SIGNS
from tangent_arithmetic.data.suites import get_suite
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.miniatures import (
    MAKERS,
    SYNSETS,
    TEXTURES,
    Patch,
    make_folders,
    make_gtsrb,
    make_imagenet,
    make_mnist,
    make_resisc45,
    picture,
    write,
)

# What the loaders return


def made(name: str, root: Path, patch: Patch) -> Splits:
    """The splits of a data set whose small files have just been written below `root`."""
    MAKERS[name](root, patch)
    return CLIP8_SETS[name](root)


def labels(pictures: Pictures) -> list[int]:
    """The label of each picture."""
    return [pictures[i][1] for i in range(len(pictures))]


def levels(pictures: Pictures) -> list[int]:
    """The grey level of each picture."""
    greys: list[Any] = [pictures[i][0].convert("L").getpixel((0, 0)) for i in range(len(pictures))]
    return greys


@pytest.mark.parametrize("name", MAKERS)
def test_pictures_are_what_a_data_loader_needs(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """PIL images with plain integers, which workers can be sent."""
    splits = made(name, tmp_path, monkeypatch)
    assert (splits.val is not None) == (name == "EuroSAT")
    for pictures in (splits.train, splits.test):
        image, label = pictures[len(pictures) - 1]
        assert isinstance(image, Image.Image)
        assert type(label) is int
        copy = pickle.loads(pickle.dumps(pictures))  # as for the workers of a DataLoader
        assert len(copy) == len(pictures)
        assert copy[0][1] == pictures[0][1]
    assert len(set(splits.classnames)) == len(splits.classnames) or name == "ImageNet"


def test_the_makers_cover_every_set() -> None:
    """The public names, in the order of the registry."""
    assert list(MAKERS) == list(CLIP8_SETS)


@pytest.mark.parametrize("name", MAKERS)
def test_classes_are_known_without_pictures(name: str) -> None:
    """One phrase a class, as many as the suite's table says."""
    found = classnames(name)
    counts = {task: facts.num_classes for task, facts in get_suite("clip8").tasks.items()}
    counts |= {"ImageNet": 1000, "CIFAR10": 10, "CIFAR100": 100, "STL10": 10}
    assert len(found) == counts[name]
    assert len(set(found)) == len(found) or name == "ImageNet"  # two cranes, two maillots
    assert all(phrase == " ".join(phrase.split()) != "" for phrase in found)


@pytest.mark.parametrize("name", ["DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "STL10", "SVHN"])
def test_classes_on_disk_are_those(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Where the miniature has the true folders and files."""
    assert made(name, tmp_path, monkeypatch).classnames == classnames(name)


def test_the_order_of_the_longer_lists() -> None:
    """Cars in that of the developer kit, scenes in that of their folders, which is not theirs."""
    assert classnames("Cars")[0] == "AM General Hummer SUV 2000"
    assert classnames("Cars")[-1] == "smart fortwo Convertible 2012"
    scenes = classnames("SUN397")
    assert scenes[0] == "abbey" and scenes[-1] == "youth hostel"
    assert scenes.index("waterfall block") + 1 == scenes.index("waterfall fan")
    assert list(classnames("CIFAR100")) == sorted(classnames("CIFAR100"))


def test_cars(tmp_path: Path, monkeypatch: Patch) -> None:
    """Names are those of the developer kit."""
    splits = made("Cars", tmp_path, monkeypatch)
    assert labels(splits.train) == [13, 195, 0]
    assert labels(splits.test) == [195, 1]
    assert levels(splits.train) == [0, 10, 20]
    assert len(splits.classnames) == 196
    assert splits.classnames[0] == "AM General Hummer SUV 2000"
    assert splits.classnames[-1] == "smart fortwo Convertible 2012"


def test_cifar10(tmp_path: Path, monkeypatch: Patch) -> None:
    """Batches follow one another."""
    splits = made("CIFAR10", tmp_path, monkeypatch)
    assert labels(splits.train) == levels(splits.train) == list(range(10))
    assert labels(splits.test) == [1, 3, 5]
    assert levels(splits.test) == [21, 23, 25]
    assert splits.classnames[:2] == ("airplane", "automobile")
    assert len(splits.classnames) == 10


def test_cifar100_has_the_fine_labels_as_phrases(tmp_path: Path, monkeypatch: Patch) -> None:
    """Underscores become spaces, as in the prompts of CLIP."""
    splits = made("CIFAR100", tmp_path, monkeypatch)
    assert labels(splits.train) == [1, 2, 3, 4]
    assert levels(splits.test) == [5, 6]
    assert splits.classnames[:2] == ("apple", "aquarium fish")
    assert (len(splits.classnames), splits.classnames[-1]) == (100, "worm")


def test_dtd_tests_on_its_val_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    """Labels count along the sorted folders."""
    splits = made("DTD", tmp_path, monkeypatch)
    assert labels(splits.train) == labels(splits.test) == [0, *range(47)]
    assert levels(splits.train) == [41, *[40] * 47]
    assert levels(splits.test) == [81, *[80] * 47]
    assert splits.classnames == tuple(TEXTURES)
    assert splits.classnames[30] == "polka-dotted"


def test_eurosat_has_a_validation_split_and_the_wording_of_clip(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """The only set that brings its own validation split."""
    splits = made("EuroSAT", tmp_path, monkeypatch)
    assert splits.val is not None
    for pictures, level in ((splits.train, 40), (splits.val, 80), (splits.test, 120)):
        assert labels(pictures) == [0, *range(10)]
        assert levels(pictures) == [level + 1, *[level] * 10]
    assert splits.classnames == (
        "annual crop land",
        "forest",
        "brushland or shrubland",
        "highway or road",
        "industrial buildings or commercial buildings",
        "pasture land",
        "permanent crop land",
        "residential buildings or homes or apartments",
        "river",
        "lake or sea",
    )


def test_gtsrb(tmp_path: Path, monkeypatch: Patch) -> None:
    """Training labels come from the folders, test labels from the table."""
    splits = made("GTSRB", tmp_path, monkeypatch)
    assert labels(splits.train) == levels(splits.train) == list(range(43))
    assert labels(splits.test) == [16, 1, 42]
    assert levels(splits.test) == [116, 101, 142]
    assert splits.classnames == SIGNS
    assert len(set(SIGNS)) == 43
    assert SIGNS[0] == "red and white circle 20 kph speed limit"
    assert SIGNS[14] == "stop"
    assert SIGNS[40] == "blue circle with white arrows indicating a traffic circle"


@pytest.mark.parametrize("val", ["val_in_folder", "val"])
def test_imagenet(val: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Both names of the validation folder work; training pictures are listed when first used."""
    make_imagenet(tmp_path, monkeypatch)
    (tmp_path / "imagenet" / "val_in_folder").rename(tmp_path / "imagenet" / val)
    splits = CLIP8_SETS["ImageNet"](tmp_path)
    for split in ("train", val):
        picture(tmp_path / "imagenet" / split / SYNSETS[999] / "zlate.JPEG", 200)
    assert len(splits.train) == 1002
    assert len(splits.test) == 1001
    assert [splits.test[i][1] for i in (0, 1, 2, 1000)] == [0, 0, 1, 999]
    assert [splits.train[i][1] for i in (0, 1, 2, 1000)] == [0, 0, 1, 999]
    assert splits.train[500][0].getpixel((0, 0)) == (40, 40, 40)
    assert splits.test[500][0].getpixel((0, 0)) == (80, 80, 80)
    assert len(splits.classnames) == 1000
    assert (splits.classnames[0], splits.classnames[-1]) == ("tench", "toilet paper")


def test_mnist(tmp_path: Path, monkeypatch: Patch) -> None:
    """Idx files hold the pictures row by row."""
    splits = made("MNIST", tmp_path, monkeypatch)
    assert labels(splits.train) == [5, 0, 4, 1]
    assert levels(splits.train) == [50, 0, 40, 10]
    assert labels(splits.test) == [7, 2]
    assert splits.train[0][0].size == (28, 28)
    assert splits.classnames == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")


def test_resisc45_follows_its_lists_in_the_order_of_the_folders(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """The lists are in another order than the folders."""
    splits = made("RESISC45", tmp_path, monkeypatch)
    assert labels(splits.train) == [0, *range(45)]
    assert labels(splits.test) == list(range(45))
    assert levels(splits.train) == [20] * 46
    assert levels(splits.test) == [60] * 45
    assert len(splits.classnames) == 45
    assert splits.classnames[2] == "baseball diamond"
    assert splits.classnames[-2:] == ("thermal power station", "wetland")


def test_stl10(tmp_path: Path, monkeypatch: Patch) -> None:
    """The unlabelled pictures are left out."""
    splits = made("STL10", tmp_path, monkeypatch)
    assert labels(splits.train) == [0, 9, 2]
    assert levels(splits.train) == [1, 10, 3]
    assert labels(splits.test) == [1, 7]
    assert splits.train[0][0].size == (96, 96)
    assert len(splits.classnames) == 10
    assert splits.classnames[2:8] == ("car", "cat", "deer", "dog", "horse", "monkey")


def test_sun397_drops_the_letter_from_its_names(tmp_path: Path, monkeypatch: Patch) -> None:
    """Folder `a_abbey` is an "abbey"."""
    splits = made("SUN397", tmp_path, monkeypatch)
    assert labels(splits.train) == labels(splits.test) == [0, *range(397)]
    assert splits.train[5][0].convert("L").getpixel((0, 0)) == 40
    assert splits.test[5][0].convert("L").getpixel((0, 0)) == 80
    assert splits.classnames[:2] == ("abbey", "place 000")
    assert splits.classnames[-1] == "youth hostel"


def test_svhn_counts_its_tenth_class_as_zero(tmp_path: Path, monkeypatch: Patch) -> None:
    """The file says 10 where a zero is seen."""
    splits = made("SVHN", tmp_path, monkeypatch)
    assert labels(splits.train) == [1, 9, 0]
    assert levels(splits.train) == [1, 9, 10]
    assert labels(splits.test) == [5, 0]
    assert splits.classnames == tuple(str(i) for i in range(10))


# What the loaders refuse

FIRST_MISSING = {
    "Cars": "stanford_cars/devkit/cars_meta.mat",
    "CIFAR10": "cifar-10-batches-py/data_batch_1",
    "CIFAR100": "cifar-100-python/train",
    "DTD": "dtd/train",
    "EuroSAT": "EuroSAT_splits/train",
    "GTSRB": "gtsrb/GTSRB/Training",
    "ImageNet": "imagenet/train",
    "MNIST": "MNIST/raw/train-images-idx3-ubyte",
    "RESISC45": "resisc45/NWPU-RESISC45",
    "STL10": "stl10/stl10_binary/train_X.bin",
    "SUN397": "sun397/train",
    "SVHN": "svhn/train_32x32.mat",
}


@pytest.mark.parametrize("name", CLIP8_SETS)
def test_an_empty_root_is_refused(name: str, tmp_path: Path) -> None:
    """The message names the data set and the first path it needs."""
    path = re.escape(f"data set {name} is not complete: {tmp_path / FIRST_MISSING[name]} does not")
    with pytest.raises(MissingFileError, match=path):
        CLIP8_SETS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("Cars", "stanford_cars/devkit/cars_train_annos.mat"),
        ("Cars", "stanford_cars/cars_test_annos_withlabels.mat"),
        ("Cars", "stanford_cars/cars_test"),
        ("CIFAR10", "cifar-10-batches-py/data_batch_3"),
        ("CIFAR10", "cifar-10-batches-py/batches.meta"),
        ("CIFAR100", "cifar-100-python/test"),
        ("DTD", "dtd/val"),
        ("EuroSAT", "EuroSAT_splits/val"),
        ("EuroSAT", "EuroSAT_splits/test"),
        ("GTSRB", "gtsrb/GTSRB/Final_Test"),
        ("GTSRB", "gtsrb/GT-final_test.csv"),
        ("MNIST", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("RESISC45", "resisc45/resisc45-test.txt"),
        ("STL10", "stl10/stl10_binary/test_y.bin"),
        ("SVHN", "svhn/test_32x32.mat"),
    ],
)
def test_a_missing_part_is_named(
    name: str, victim: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Whatever file or folder is taken away is the one the message names."""
    MAKERS[name](tmp_path, monkeypatch)
    path = tmp_path / victim
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingFileError, match=f"{re.escape(str(path))}.* does not exist"):
        CLIP8_SETS[name](tmp_path)


def test_packed_mnist_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: Patch) -> None:
    """Archives alone do not do."""
    make_mnist(tmp_path, monkeypatch)
    for path in (tmp_path / "MNIST" / "raw").glob("*-ubyte"):
        path.unlink()
    with pytest.raises(MissingFileError, match=r"gunzip the \.gz files"):
        CLIP8_SETS["MNIST"](tmp_path)


@pytest.mark.parametrize(
    ("name", "victim"),
    [
        ("Cars", "stanford_cars/devkit/cars_train_annos.mat"),
        ("CIFAR10", "cifar-10-batches-py/data_batch_3"),
        ("CIFAR100", "cifar-100-python/meta"),
        ("MNIST", "MNIST/raw/train-images-idx3-ubyte"),
        ("STL10", "stl10/stl10_binary/train_X.bin"),
        ("SVHN", "svhn/test_32x32.mat"),
    ],
)
def test_a_damaged_file_is_refused(
    name: str, victim: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A file cut short is told apart from a missing one."""
    MAKERS[name](tmp_path, monkeypatch)
    content = bytearray((tmp_path / victim).read_bytes())
    (tmp_path / victim).write_bytes(content[: len(content) // 3])
    with pytest.raises(UsageError, match=f"data set {name} cannot be read from .* damaged") as got:
        CLIP8_SETS[name](tmp_path)
    assert "download=True" not in str(got.value)


@pytest.mark.parametrize(("rows", "listed"), [(1, 0), (3, 2), (5, 4)])
def test_gtsrb_refuses_a_table_that_does_not_fit_its_pictures(
    rows: int, listed: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A table cut short would leave pictures out of the test split without a word."""
    make_gtsrb(tmp_path, monkeypatch)
    table = tmp_path / "gtsrb" / "GT-final_test.csv"
    lines = [*table.read_text().splitlines(), "00003.ppm;8;8;1;1;6;6;5"]
    write(table, "\n".join(lines[:rows]) + "\n")
    with pytest.raises(UsageError, match=rf"GT-final_test.csv lists {listed} images, .* holds 3"):
        CLIP8_SETS["GTSRB"](tmp_path)


def test_gtsrb_refuses_the_table_without_labels(tmp_path: Path, monkeypatch: Patch) -> None:
    """The archive of the test pictures has a table of its own, which lacks the classes."""
    make_gtsrb(tmp_path, monkeypatch)
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2"
    write(tmp_path / "gtsrb" / "GT-final_test.csv", f"{header}\n00000.ppm;8;8;1;1;6;6\n")
    with pytest.raises(UsageError, match=r"data set GTSRB cannot be read .* 'ClassId'"):
        CLIP8_SETS["GTSRB"](tmp_path)


@pytest.mark.parametrize(
    ("name", "victim", "count"),
    [
        ("DTD", "dtd/train/banded", 46),
        ("EuroSAT", "EuroSAT_splits/test/River", 9),
        ("GTSRB", "gtsrb/GTSRB/Training/00007", 42),
        ("ImageNet", f"imagenet/val_in_folder/{SYNSETS[999]}", 999),
        ("RESISC45", "resisc45/NWPU-RESISC45/sea_ice", 44),
        ("SUN397", "sun397/val/a_abbey", 396),
    ],
)
def test_a_class_without_a_folder_is_refused(
    name: str, victim: str, count: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    """One folder less would shift the labels."""
    MAKERS[name](tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / victim)
    parent = re.escape(str((tmp_path / victim).parent))
    with pytest.raises(UsageError, match=rf"expected \d+ class folders in {parent}.*got {count}"):
        CLIP8_SETS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "old", "new"),
    [
        ("DTD", "dtd/val", "banded", "Banded"),
        ("EuroSAT", "EuroSAT_splits/train", "SeaLake", "Sea_Lake"),
        ("GTSRB", "gtsrb/GTSRB/Training", "00042", "00043"),
        ("ImageNet", "imagenet/train", SYNSETS[0], "tench"),
        ("RESISC45", "resisc45/NWPU-RESISC45", "wetland", "wetland 2"),
        ("SUN397", "sun397/train", "a_abbey", "abbey"),
    ],
)
def test_an_unknown_class_folder_is_refused(
    name: str, folder: str, old: str, new: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """One folder more would shift the labels, too."""
    MAKERS[name](tmp_path, monkeypatch)
    (tmp_path / folder / old).rename(tmp_path / folder / new)
    with pytest.raises(UsageError, match=f"not a class: {re.escape(new)}"):
        CLIP8_SETS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "old", "new"),
    [
        ("DTD", "dtd/val", "banded", "bandy"),
        ("ImageNet", "imagenet/val_in_folder", SYNSETS[0], "n00000001"),
        ("SUN397", "sun397/train", "a_abbey", "a_abbot"),
    ],
)
def test_splits_with_different_classes_are_refused(
    name: str, folder: str, old: str, new: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The same label must mean the same class."""
    MAKERS[name](tmp_path, monkeypatch)
    (tmp_path / folder / old).rename(tmp_path / folder / new)
    with pytest.raises(UsageError, match=f"same class folders.*: {', '.join(sorted((old, new)))}"):
        CLIP8_SETS[name](tmp_path)


def test_unsorted_imagenet_validation_pictures_are_refused(tmp_path: Path) -> None:
    """The archive of the validation pictures unpacks to one flat folder."""
    make_folders(tmp_path / "imagenet", {"train": 40}, SYNSETS, ".JPEG")
    picture(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG", 9)
    with pytest.raises(UsageError, match=r"expected 1000 class folders in \S+/val, .* got 0"):
        CLIP8_SETS["ImageNet"](tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"), [("DTD", "dtd/val/woven"), ("SUN397", "sun397/train/a_abbey")]
)
def test_a_class_without_pictures_is_refused(
    name: str, folder: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """An empty folder is a copy that broke off."""
    MAKERS[name](tmp_path, monkeypatch)
    for path in (tmp_path / folder).iterdir():
        path.unlink()
    with pytest.raises(MissingFileError, match=f"not complete below .*{Path(folder).name}"):
        CLIP8_SETS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("DTD", "dtd/train/woven/woven_0001.jpg", "dtd/val/woven/woven_0001.jpg"),
        (
            "EuroSAT",
            "EuroSAT_splits/val/River/River_1.jpg",
            "EuroSAT_splits/test/River/River_1.jpg",
        ),
    ],
)
def test_a_picture_in_two_splits_is_refused(
    name: str, one: str, other: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Test pictures among the training ones spoil the accuracy."""
    MAKERS[name](tmp_path, monkeypatch)
    picture(tmp_path / one, 7)
    picture(tmp_path / other, 9)
    CLIP8_SETS[name](tmp_path)  # one name for two pictures is no leak
    picture(tmp_path / other, 7)
    with pytest.raises(UsageError, match=f"{one} and .*{other} are the same image in two splits"):
        CLIP8_SETS[name](tmp_path)


def test_resisc45_refuses_a_list_that_names_an_unknown_class(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """The list and the folders must fit."""
    make_resisc45(tmp_path, monkeypatch)
    write(tmp_path / "resisc45" / "resisc45-test.txt", "airplane_003.jpg\nairship_001.jpg\n")
    with pytest.raises(UsageError, match=r"resisc45-test\.txt names classes .*: 'airship'"):
        CLIP8_SETS["RESISC45"](tmp_path)


def test_resisc45_refuses_a_list_whose_picture_is_missing(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """A picture that is not there is not passed over."""
    make_resisc45(tmp_path, monkeypatch)
    (tmp_path / "resisc45" / "NWPU-RESISC45" / "airplane" / "airplane_700.jpg").unlink()
    with pytest.raises(MissingFileError, match=r"46 images .*, 1 are .* airplane/airplane_700"):
        CLIP8_SETS["RESISC45"](tmp_path)


def test_importing_the_loaders_is_light() -> None:
    """Naming the sets costs no import of torch."""
    code = (
        "import sys, tangent_arithmetic.data.clip8; "
        "print([m for m in ('torch', 'torchvision', 'open_clip', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
