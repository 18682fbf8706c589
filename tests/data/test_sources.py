"""Where public data sets come from: each source reads the others' format, or says what it needs.

The hub's data sets are parquet files in folders that the real `datasets.load_dataset` reads.
"""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import random_split
from torchvision import datasets as torchvision_sets

from tangent_arithmetic.data.base import ArrayPictures, Pictures, Splits, SubsetPictures, require
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.clip8.folders import LazyPictures
from tangent_arithmetic.data.hub import HubPictures, HubSet, match_classes
from tangent_arithmetic.data.identity import fingerprint, labels_of, split_hash, split_ids
from tangent_arithmetic.data.loading import eval_loader
from tangent_arithmetic.data.registry import get_dataset, split_record
from tangent_arithmetic.data.sources import Layout, PublicSet, load_public
from tangent_arithmetic.data.suites import SUITES
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.conftest import MakeArgs
from tests.data.test_clip8 import labels, levels
from tests.miniatures import MAKERS, SUN_FOLDERS, SYNSETS, TEXTURES, make_folders, picture, write

Patch = pytest.MonkeyPatch
SAME = ("Cars", "CIFAR10", "CIFAR100", "GTSRB", "MNIST")
ON_HUB = [name for name, entry in CLIP8_SETS.items() if entry.hub]


# torchvision's layouts, in small


def dtd_lists(root: Path) -> dict[str, list[str]]:
    """Three pictures a texture, one a list; each file's grey level tells its list."""
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for i, (name, files) in enumerate(lists.items()):
        for texture in reversed(TEXTURES):
            files.append(f"{texture}/{texture}_{9 - i:04d}.jpg")
            picture(root / "dtd" / "dtd" / "images" / files[-1], 40 * (i + 1))
        write(root / "dtd" / "dtd" / "labels" / f"{name}1.txt", "\n".join(files) + "\n")
    return lists


def sun_paths() -> list[str]:
    """The classes as the published lists spell them; one has a folder below another."""
    places = [f"/{name[0]}/{name[2:]}" for name in SUN_FOLDERS]
    places[7] = "/b/place/006"  # is b_place_006 in the seeds' folders
    return places


def make_sun397(root: Path, patch: Patch) -> None:
    """Pictures in a tree of places, and the lists of the first partition beside them."""
    folder = root / "SUN397"
    write(folder / "ClassName.txt", "\n".join(sun_paths()) + "\n")
    for name, level in {"Training": 40, "Testing": 80}.items():
        files = [f"{place}/sun_{name.lower()}.jpg" for place in sun_paths()]
        files.append(f"/a/abbey/sun_{name.lower()}_more.jpg")
        for file in files:
            picture(folder / file[1:], level)
        write(folder / f"{name}_01.txt", "\n".join(reversed(files)) + "\n")


def make_imagenet(root: Path, patch: Patch) -> None:
    """Folders of pictures in the root itself, and torchvision's file of class names."""
    make_folders(root, {"train": 40, "val": 80}, SYNSETS, ".JPEG")
    write(root / "meta.bin", b"")


def up_one(name: str, folder: str) -> Any:
    """A maker of the seeds' folders, whose set is then moved from `folder` into the root."""

    def make(root: Path, patch: Patch) -> None:
        root.mkdir(exist_ok=True)
        MAKERS[name](root, patch)
        for path in (root / folder).iterdir():
            path.rename(root / path.name)
        (root / folder).rmdir()

    return make


TORCHVISION = {
    "DTD": lambda root, patch: dtd_lists(root),
    "ImageNet": make_imagenet,
    "STL10": up_one("STL10", "stl10"),
    "SUN397": make_sun397,
    "SVHN": up_one("SVHN", "svhn"),
}


# data sets of the hub, in small


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Any:
    """The library, whose cache is temporary."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    library.disable_progress_bars()
    return library


def class_features(library: Any, names: Sequence[str], image: str, label: str) -> dict[str, Any]:
    return {image: library.Image(), label: library.ClassLabel(names=list(names))}


def to_parquet(
    library: Any, folder: Path, features: dict[str, Any], splits: dict[str, list[int]]
) -> None:
    """Writes splits as the hub has them; picture i is grey of level i, and 100 more per split."""
    for number, (split, ids) in enumerate(splits.items()):
        columns: dict[str, list[Any]] = {}
        for name, feature in features.items():
            if isinstance(feature, library.Image):
                greys = range(100 * number, 100 * number + len(ids))
                columns[name] = [Image.new("L", (4, 4), grey) for grey in greys]
            else:
                columns[name] = list(ids)
        folder.mkdir(parents=True, exist_ok=True)
        table = library.Dataset.from_dict(columns, features=library.Features(features))
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def card(name: str, config: str, folder: str, splits: dict[str, list[int]]) -> str:
    """The head of a README of the hub: the configuration's files and the sizes of its splits."""
    lines = ["---", "dataset_info:", f"  config_name: {config}", "  splits:"]
    for split, ids in splits.items():
        lines += [
            f"  - name: {split}",
            f"    num_bytes: {len(ids)}",
            f"    num_examples: {len(ids)}",
        ]
    lines += ["configs:", f"- config_name: {config}", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {folder}/{split}-*"]
    return "\n".join([*lines, "---", name, ""])


def on_hub(
    library: Any,
    root: Path,
    patch: Patch,
    name: str,
    names: Sequence[str],
    ids: list[int],
    image: str = "image",
) -> PublicSet:
    """Puts a set on a hub that is a folder, with a split that nobody wants."""
    entry = CLIP8_SETS[name]
    assert entry.hub is not None
    folder = (entry.hub.files or "data/{}").rpartition("/")[0]
    features = class_features(library, names, image, entry.hub.label or "label")
    if entry.hub.label:
        features["coarse_label"] = library.ClassLabel(names=list(names))
    splits = {"train": ids, "test": ids[:2], "contrast": ids[:1]}
    to_parquet(library, root / folder, features, splits)
    readme = card(name, entry.hub.config or "default", folder, splits)
    write(root / "README.md", readme)
    found = replace(entry, hub=replace(entry.hub, repo=str(root)))
    patch.setitem(CLIP8_SETS, name, found)
    return found


# folders and torchvision


@pytest.mark.parametrize("name", CLIP8_SETS)
def test_the_seeds_folders_come_first(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    if name in TORCHVISION:
        TORCHVISION[name](tmp_path, monkeypatch)
    MAKERS[name](tmp_path, monkeypatch)
    auto = load_public(name, CLIP8_SETS[name], tmp_path)
    named = load_public(name, CLIP8_SETS[name], tmp_path, "folder")
    assert auto.source == named.source == "folder"
    assert labels(auto.test)[:50] == labels(CLIP8_SETS[name](tmp_path).test)[:50]


@pytest.mark.parametrize("name", SAME)
def test_a_layout_that_both_have_is_the_folder_s(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    assert CLIP8_SETS[name].torchvision == "same"
    MAKERS[name](tmp_path, monkeypatch)
    assert load_public(name, CLIP8_SETS[name], tmp_path, "torchvision").source == "folder"


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("source", ["auto", "torchvision"])
def test_torchvision_s_layouts_are_found(
    name: str, source: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    for folder, makers in (("a", MAKERS), ("b", TORCHVISION)):
        (tmp_path / folder).mkdir()
        makers[name](tmp_path / folder, monkeypatch)
    ours = CLIP8_SETS[name](tmp_path / "a")
    found = load_public(name, CLIP8_SETS[name], tmp_path / "b", source)
    assert found.source == "torchvision"
    assert found.classnames == ours.classnames or name == "SUN397"
    assert sorted(set(labels(found.train))) == sorted(set(labels(ours.train)))
    assert sorted(set(labels(found.test))) == sorted(set(labels(ours.test)))
    with pytest.raises(MissingFileError, match="is not complete"):
        load_public(name, CLIP8_SETS[name], tmp_path / "b", "folder")


def test_dtd_of_torchvision_is_partition_one_in_the_order_of_folders(tmp_path: Path) -> None:
    lists = dtd_lists(tmp_path)
    found = load_public("DTD", CLIP8_SETS["DTD"], tmp_path, "torchvision")
    assert split_ids(found.train) == sorted([*lists["train"], *lists["val"]])
    assert split_ids(found.test) == sorted(lists["test"])
    assert levels(found.train) == [80, 40] * 47 and levels(found.test) == [120] * 47
    assert labels(found.train) == [label for label in range(47) for _ in range(2)]
    for split, pictures in (("train", found.train), ("val", found.train), ("test", found.test)):
        theirs = torchvision_sets.DTD(tmp_path, split)
        paths = {
            str(path): label
            for path, label in zip(theirs._image_files, theirs._labels, strict=True)
        }
        assert paths.items() <= dict(pictures.samples).items()  # type: ignore[attr-defined]


def test_dtd_in_both_layouts_has_one_split(tmp_path: Path, monkeypatch: Patch) -> None:
    """The published split acts on the order of the files, which is the same for both."""
    lists = dtd_lists(tmp_path / "theirs")
    images = tmp_path / "theirs" / "dtd" / "dtd" / "images"
    for split, folder in {"train": "train", "val": "train", "test": "val"}.items():
        for file in lists[split]:
            path = tmp_path / "ours" / "dtd" / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / file, path)
    records = [
        split_record(get_dataset("DTDVal", None, tmp_path / root)) for root in ("ours", "theirs")
    ]
    assert [record.pop("source") for record in records] == ["folder", "torchvision"]
    assert records[0] == records[1]
    assert None not in records[0].values() and records[0]["train"] != records[0]["val"]


def test_sun397_of_torchvision_has_the_labels_of_the_folders(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    make_sun397(tmp_path, monkeypatch)
    found = load_public("SUN397", CLIP8_SETS["SUN397"], tmp_path)
    assert labels(found.train) == labels(found.test) == [0, *range(397)]
    assert levels(found.train) == [40] * 398 and levels(found.test) == [80] * 398
    assert found.classnames[:2] == ("abbey", "place 000")
    assert found.classnames[7] == "place 006" and found.classnames[-1] == "youth hostel"
    image, _ = found.train[0]
    assert image.mode == "RGB"
    theirs = torchvision_sets.SUN397(tmp_path)
    names = dict(zip(map(str, theirs._image_files), theirs._labels, strict=True))
    for path, label in found.train.samples:  # type: ignore[attr-defined]
        place = theirs.classes[names[path]].replace("/", " ").replace("_", " ")
        assert place == found.classnames[label]


@pytest.mark.parametrize(
    "what", ["no lists", "a picture less", "a class less", "a leak", "utf-16", "a way out"]
)
def test_lists_that_do_not_fit_are_refused(what: str, tmp_path: Path, monkeypatch: Patch) -> None:
    make_sun397(tmp_path, monkeypatch)
    folder = tmp_path / "SUN397"
    train = (folder / "Training_01.txt").read_text()
    kind: type[UsageError] = UsageError
    if what == "no lists":
        (folder / "Training_01.txt").unlink()
        kind, message = MissingFileError, "Training_01.txt does not exist.*official partitions"
    elif what == "a picture less":
        (folder / "a" / "abbey" / "sun_testing.jpg").unlink()
        kind, message = (
            MissingFileError,
            "of the 398 images .*, 1 are missing, .*/abbey/sun_testing",
        )
    elif what == "a class less":
        lines = [line for line in train.splitlines() if "/y/" not in line]
        write(folder / "Training_01.txt", "\n".join(lines))
        message = "expected 397 classes .* got 396"
    elif what == "utf-16":
        (folder / "Training_01.txt").write_bytes(train.encode("utf-16"))
        message = "Training_01.txt cannot be read as a text in UTF-8"
    elif what == "a way out":
        write(folder / "Training_01.txt", train + "/a/../../../x.jpg\n")
        message = r"Training_01.txt is refused: it names 'a/\.\./\.\./\.\./x\.jpg', which leads out"
    else:
        write(folder / "Training_01.txt", train + "/a/abbey/sun_testing.jpg\n")
        message = "a/abbey/sun_testing.jpg and .*/sun_testing.jpg are the same image in two splits"
    with pytest.raises(kind, match=message):
        load_public("SUN397", CLIP8_SETS["SUN397"], tmp_path)


def test_eurosat_of_torchvision_is_refused_with_the_reason(tmp_path: Path) -> None:
    picture(tmp_path / "eurosat" / "2750" / "Forest" / "Forest_1.jpg", 4)
    with pytest.raises(MissingFileError, match=r"no training and test split.*EuroSAT_splits"):
        load_public("EuroSAT", CLIP8_SETS["EuroSAT"], tmp_path, "torchvision")


def test_what_torchvision_or_the_hub_does_not_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="RESISC45 is not one of torchvision's"):
        load_public("RESISC45", CLIP8_SETS["RESISC45"], tmp_path, "torchvision")
    with pytest.raises(MissingFileError, match="ImageNet is not available from the hub"):
        load_public("ImageNet", CLIP8_SETS["ImageNet"], tmp_path, "hub")


# the order of the sources


@pytest.fixture
def asked(monkeypatch: Patch) -> list[str]:
    """The sets that the hub was asked for; it has all of them."""
    seen: list[str] = []

    def load(name: str, entry: HubSet) -> Splits:
        seen.append(entry.repo)
        levels = np.arange(120, dtype=np.uint8).reshape(2, 20, 1, 1, 3)
        train, test = (ArrayPictures(images, np.arange(20)) for images in levels)
        return Splits(train, test, entry.classnames)

    monkeypatch.setattr("tangent_arithmetic.data.sources.load_hub", load)
    return seen


def test_the_hub_is_asked_last_and_only_where_it_is_needed(
    asked: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    dtd_lists(tmp_path)
    assert load_public("DTD", CLIP8_SETS["DTD"], tmp_path).source == "torchvision"
    assert asked == []
    assert load_public("MNIST", CLIP8_SETS["MNIST"], tmp_path).source == "hub"
    assert asked == ["ylecun/mnist"]
    assert load_public("DTD", CLIP8_SETS["DTD"], tmp_path, "hub").source == "hub"
    assert asked == ["ylecun/mnist", "tanganke/dtd"]
    assert get_dataset("MNISTVal", None, tmp_path).source == "hub"
    with pytest.raises(MissingFileError, match="MNIST is not complete"):
        get_dataset("MNISTVal", None, tmp_path, data_source="folder")


@pytest.mark.parametrize(
    ("name", "part"),
    [("DTD", "dtd/val"), ("SVHN", "svhn/test_32x32.mat"), ("STL10", "stl10/stl10_binary")],
)
def test_a_set_that_is_half_there_is_an_error_not_a_reason_to_go_on(
    name: str, part: str, asked: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    path = tmp_path / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if name == "DTD":
        dtd_lists(tmp_path)
    with pytest.raises(MissingFileError, match=rf"{name} is not complete: .* does not exist"):
        load_public(name, CLIP8_SETS[name], tmp_path)
    assert asked == []


def test_one_error_lists_what_each_source_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        load_public("DTD", CLIP8_SETS["DTD"], tmp_path)
    first, folder, torchvision, hub, last = str(caught.value).splitlines()
    assert first == "no source has data set DTD."
    assert folder.startswith(f"  folder: data set DTD is not complete: {tmp_path}/dtd/train does")
    assert torchvision.startswith("  torchvision: ") and "dtd/dtd/labels/train1.txt" in torchvision
    assert hub.startswith("  hub: data set DTD: tanganke/dtd ")
    assert last.startswith("Provide one of these. ") and "--data-location" in last
    assert "--suite=embedded" in last and "--suite=embedded" not in folder


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown data source 'hubs'; choose from hub, "):
        get_dataset("DTD", None, tmp_path, data_source="hubs")


def test_the_embedded_suite_has_a_source_of_its_own(args: MakeArgs) -> None:
    settings = args(data_source="hub")
    hashes = Run.of(settings).data.split_hashes(["MNISTVal", "MNIST"])
    assert None not in hashes.values() and len(set(hashes.values())) == 2
    data = get_dataset("MNISTVal", None, ".", suite="embedded", cache_dir=settings.cache_dir)
    assert split_record(data)["source"] == "embedded"


# the hub


@pytest.mark.parametrize("name", ON_HUB)
def test_labels_of_the_hub_are_ours_whatever_their_order(
    name: str, hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Class k there is class n - 1 - k here, and every name is spelt in another way."""
    own = CLIP8_SETS[name].hub
    assert own is not None
    count = len(own.classnames)
    names = [phrase.upper().replace(" ", "_") for phrase in reversed(own.classnames)]
    ids = [0, 1, count - 1, count // 2]
    on_hub(hub, tmp_path / "repo", monkeypatch, name, names, ids, "img")
    found = get_dataset(name, None, tmp_path / "nothing")
    assert found.source == "hub" and found.classnames == own.classnames
    assert labels(found.train) == [count - 1 - i for i in ids]
    assert labels_of(found.train).tolist() == labels(found.train)
    assert labels(found.test) == [count - 1, count - 2]
    assert levels(found.train) == [0, 1, 2, 3]
    assert found.train[0][0].mode == "RGB"


@pytest.mark.parametrize("name", ["DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "STL10", "SVHN",
                                  "CIFAR10"])  # fmt: skip
def test_the_hub_s_classes_are_those_of_the_folders(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    entry = CLIP8_SETS[name]
    assert entry.hub is not None
    assert entry.hub.classnames == entry(tmp_path).classnames


@pytest.mark.parametrize("name", ON_HUB)
def test_class_names_are_as_many_as_the_suite_says_and_told_apart(name: str) -> None:
    entry = CLIP8_SETS[name].hub
    assert entry is not None
    suite = SUITES["clip8"]
    assert len(entry.classnames) == {**suite.tasks, **suite.related}[name].num_classes
    order = list(range(len(entry.classnames)))
    assert list(match_classes(name, entry, list(entry.classnames))) == order


def test_aliases_stand_for_their_classes() -> None:
    cifar, land = CLIP8_SETS["CIFAR100"].hub, CLIP8_SETS["EuroSAT"].hub
    assert cifar is not None and land is not None
    theirs = ["cra" if name == "crab" else name for name in cifar.classnames]
    assert match_classes("CIFAR100", cifar, theirs) == tuple(range(100))
    assert match_classes("EuroSAT", land, [*land.aliases]) == tuple(range(10))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "d"], r"only theirs: d; only ours: c"),
        (["a", "b"], r"expected 3, got 2; only theirs: none; only ours: c"),
        (["a", "b", "c", "d"], r"expected 3, got 4; only theirs: d; only ours: none"),
        (["a", "b", "B"], r"only theirs: none; only ours: c"),
        (["0", "1", "2"], r"only theirs: 0, 1, 2; only ours: a, b, c"),
    ],
)
def test_names_that_do_not_match_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        match_classes("X", HubSet("some/x", ("a", "b", "c")), names)


@pytest.mark.parametrize("case", ["numbers", "two pictures", "no picture", "no test"])
def test_columns_that_are_not_as_expected_are_refused(
    case: str, hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    features = class_features(hub, list("0123456789"), "image", "label")
    splits = {"train": [0], "test": [1]}
    if case == "numbers":
        features["label"] = hub.Value("int64")
        message = "expected one column of type ClassLabel in .*, got none of the columns image, lab"
    elif case == "two pictures":
        features["mask"] = hub.Image()
        message = "expected one column of type Image in .*, got image, mask of"
    elif case == "no picture":
        features["image"] = hub.Value("int64")
        message = "expected one column of type Image in .*, got none of"
    else:
        del splits["test"]
        message = "has the splits train, expected train and test; test is missing"
    to_parquet(hub, tmp_path / "repo" / "data", features, splits)
    entry = replace(CLIP8_SETS["MNIST"], hub=HubSet(str(tmp_path / "repo"), tuple("0123456789")))
    with pytest.raises(UsageError, match=message) as caught:
        load_public("MNIST", entry, tmp_path, "auto")
    assert not isinstance(caught.value, MissingFileError)


@pytest.mark.parametrize("label", [-1, None])
def test_rows_without_labels_are_refused(
    label: int | None, hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The library gives -1 where labels are kept secret, which would be the last class."""
    features = class_features(hub, list("0123456789"), "image", "label")
    splits: Any = {"train": [0, 1], "test": [3, label]}
    to_parquet(hub, tmp_path / "repo" / "data", features, splits)
    entry = replace(CLIP8_SETS["MNIST"], hub=HubSet(str(tmp_path / "repo"), tuple("0123456789")))
    with pytest.raises(UsageError, match=f"row 1 of .* has label {label} .* expected 0 to 9: this"):
        load_public("MNIST", entry, tmp_path, "hub")


@pytest.mark.parametrize("stored", [True, False], ids=["in the rows", "beside them"])
@pytest.mark.parametrize(
    ("numbers", "refused"), [(range(8), True), ([5, 4, 2], True), ([1, 8, 9, 10], False)]
)
def test_rows_in_two_splits_are_refused(
    numbers: Sequence[int], refused: bool, stored: bool, hub: Any, tmp_path: Path
) -> None:
    """A few are not: some published sets have them."""
    features = hub.Features(class_features(hub, list("0123456789"), "image", "label"))
    paths = [tmp_path / f"{level}.png" for level in range(12)]
    for level, path in enumerate(paths):
        picture(path, level)
    images = [{"bytes": path.read_bytes() if stored else None, "path": str(path)} for path in paths]

    def rows(chosen: Sequence[int]) -> HubPictures:
        columns = {"image": [images[i] for i in chosen], "label": [i % 10 for i in chosen]}
        found = hub.Dataset.from_dict(columns, features=features)
        return HubPictures(found, "image", "label", tuple(range(10)))

    splits = Splits(rows(range(8)), rows(numbers), tuple("0123456789"))
    assert levels(splits.train) == list(range(8))
    entry = PublicSet(Layout(lambda location: splits, ()))
    if not refused:
        assert load_public("X", entry, tmp_path, "folder").test == splits.test
        return
    with pytest.raises(
        UsageError, match=r"of HubPictures are the same image in two splits \(of \d"
    ):
        load_public("X", entry, tmp_path, "folder")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r'tanganke/dtd needs the library datasets, .* \(pip install -e "\.\[hub\]"\)'
    for source in ("hub", "auto"):
        with pytest.raises(MissingFileError, match=message):
            load_public("DTD", CLIP8_SETS["DTD"], tmp_path, source)


def test_without_a_network_the_message_says_so(hub: Any, tmp_path: Path) -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE  # see conftest: no test asks a hub
    message = r"tanganke/dtd cannot be loaded \(ConnectionError: .*HF_HUB_OFFLINE is set: unset it"
    for source in ("hub", "auto"):
        with pytest.raises(MissingFileError, match=message):
            load_public("DTD", CLIP8_SETS["DTD"], tmp_path, source)


def test_rows_have_an_identity_and_go_to_workers(
    hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    entry = on_hub(hub, tmp_path / "repo", monkeypatch, "MNIST", "0123456789", [3, 1, 4, 1, 5])
    first, again = (load_public("MNIST", entry, tmp_path, "hub") for _ in range(2))
    assert isinstance(first.train, HubPictures)
    assert fingerprint(first.train) == fingerprint(again.train) is not None
    assert fingerprint(first.test) != fingerprint(first.train)
    shuffled = replace(first.train, labels=tuple(reversed(first.train.labels)))
    assert fingerprint(shuffled) != fingerprint(first.train)
    assert labels(pickle.loads(pickle.dumps(first.train))) == [3, 1, 4, 1, 5]
    loader = eval_loader(first.train, np.array, 2, 2)
    assert torch.cat([batch[1] for batch in loader]).tolist() == [3, 1, 4, 1, 5]


# splits


def test_mnistval_is_the_published_split_on_real_files(tmp_path: Path) -> None:
    """The public projects assert 36044; the pictures, of one pixel, tell their index."""
    count = 60000
    numbers = np.arange(count)
    digits = (numbers % 10).astype(np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    for part, size in {"train": count, "t10k": 10}.items():
        head = struct.pack(">4B3I", 0, 0, 8, 3, size, 1, 2)
        shown = numbers[:size] if part == "train" else numbers[:size] + count
        pixels = np.stack([shown // 256, shown % 256], axis=1).astype(np.uint8)
        write(raw / f"{part}-images-idx3-ubyte", head + pixels.tobytes())
        head = struct.pack(">4BI", 0, 0, 8, 1, size)
        write(raw / f"{part}-labels-idx1-ubyte", head + digits[:size].tobytes())
    data = get_dataset("MNISTVal", None, tmp_path)
    numbered: Any = range(count)
    rest, val = random_split(numbered, [55000, 5000], torch.Generator().manual_seed(0))
    assert rest.indices[0] == 36044

    def number(pictures: Pictures, index: int) -> int:
        high, low = np.asarray(pictures[index][0]).flatten().tolist()
        return int(256 * high + low)

    assert [number(data.train, i) for i in range(200)] == rest.indices[:200]
    assert [number(data.test, i) for i in range(200)] == val.indices[:200]
    assert split_ids(data.train) == [str(i) for i in rest.indices]
    assert split_ids(data.test) == [str(i) for i in val.indices]


@pytest.mark.parametrize("name", CLIP8_SETS)
def test_a_split_is_known_wherever_and_whenever_the_set_was_copied(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "here").mkdir()
    MAKERS[name](tmp_path / "here", monkeypatch)
    shutil.copytree(tmp_path / "here", tmp_path / "else" / "where")
    for path in (tmp_path / "else").rglob("*"):
        os.utime(path, (1, 1))
    records = [
        split_record(get_dataset(f"{name}Val", None, root, val_fraction=0.5))
        for root in (tmp_path / "here", tmp_path / "else" / "where")
    ]
    assert records[0] == records[1]
    assert records[0]["dataset"] == name and records[0]["source"] == "folder"
    assert all(isinstance(records[0][part], str) for part in ("train", "val"))


def test_ids_of_files_are_paths_below_the_set(tmp_path: Path) -> None:
    for file in ("a/1.png", "a/2.png", "b/1.png"):
        picture(tmp_path / "set" / file, 1)
    pictures = torchvision_sets.ImageFolder(tmp_path / "set")
    assert split_ids(pictures) == ["a/1.png", "a/2.png", "b/1.png"]
    assert split_ids(SubsetPictures(pictures, [2, 0])) == ["b/1.png", "a/1.png"]
    assert split_hash(SubsetPictures(pictures, [0, 1, 2])) == split_hash(pictures)
    assert split_hash(SubsetPictures(pictures, [0, 2, 1])) != split_hash(pictures)
    picture(tmp_path / "set" / "a" / "1.png", 9)
    os.utime(tmp_path / "set" / "a" / "1.png", (7, 7))
    again = torchvision_sets.ImageFolder(tmp_path / "set")
    assert split_hash(again) == split_hash(pictures)
    picture(tmp_path / "set" / "a" / "0.png", 9)
    assert split_hash(torchvision_sets.ImageFolder(tmp_path / "set")) != split_hash(pictures)


def test_rows_of_the_hub_are_not_taken_for_those_of_the_files(
    hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["MNIST"](tmp_path, monkeypatch)
    entry = on_hub(hub, tmp_path / "repo", monkeypatch, "MNIST", "0123456789", [5, 0, 4, 1])
    theirs, ours = (load_public("MNIST", entry, tmp_path, s) for s in ("hub", "folder"))
    assert labels(theirs.train) == labels(ours.train)
    assert split_ids(theirs.train) == ["hub/0", "hub/1", "hub/2", "hub/3"]
    assert split_ids(ours.train) == ["0", "1", "2", "3"]


def test_imagenet_is_listed_only_where_its_training_pictures_are_asked_for(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["ImageNet"](tmp_path, monkeypatch)
    whole = get_dataset("ImageNet", None, tmp_path)
    assert split_hash(whole.test) is not None
    assert isinstance(whole.train, LazyPictures) and "listing" not in vars(whole.train)
    val = get_dataset("ImageNetVal", None, tmp_path)
    assert len(split_ids(val.test) or ()) == 100 and "listing" in vars(whole.train)


class Unknown:
    """Pictures that do not say what they are."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8)), 0


def test_pictures_of_an_unknown_kind_have_no_ids() -> None:
    assert split_ids(Unknown()) is None and split_hash(Unknown()) is None
    assert split_hash(SubsetPictures(Unknown(), [0])) is None


def test_adding_a_set_takes_an_entry_and_a_reader(tmp_path: Path, monkeypatch: Patch) -> None:
    def load(location: Path) -> Splits:
        root = require(location / "new", "New", "new/{a,b}")
        train, test = (torchvision_sets.ImageFolder(root / split) for split in "ab")
        return Splits(train, test, ("red", "blue"))

    monkeypatch.setitem(CLIP8_SETS, "New", PublicSet(Layout(load, ("new",))))
    for split in "ab":
        for file in ("red/1.png", "blue/1.png", "blue/2.png"):
            picture(tmp_path / "new" / split / file, ord(split))
    assert len(get_dataset("NewVal", None, tmp_path, val_fraction=0.4).test) == 1
    with pytest.raises(MissingFileError, match="no source has data set New"):
        get_dataset("New", None, tmp_path / "elsewhere")
