"""Sources of the public data sets: folders, torchvision's layouts and the hub.

The hub's data sets are parquet files in folders that the real `datasets.load_dataset` reads.
"""

from __future__ import annotations

import pickle
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_sets

from tangent_arithmetic.data.base import ArrayPictures, Splits
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.clip20 import CLIP20_SETS, PUBLIC_SETS, tiny_imagenet
from tangent_arithmetic.data.hub import HubPictures, HubSet, match_classes
from tangent_arithmetic.data.identity import fingerprint, labels_of, split_ids
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.registry import get_dataset, split_record
from tangent_arithmetic.data.sources import Layout, PublicSet, load_public
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.conftest import MakeArgs
from tests.data.test_clip8 import labels, levels
from tests.miniatures import MAKERS, SUN_FOLDERS, SYNSETS, TEXTURES, make_folders, picture, write

Patch = pytest.MonkeyPatch
SAME = ("Cars", "CIFAR10", "CIFAR100", "GTSRB", "MNIST")
ON_HUB = [name for name, entry in PUBLIC_SETS.items() if entry.hub]


# --- miniatures of torchvision's layouts


def dtd_lists(root: Path) -> dict[str, list[str]]:
    """Three pictures a texture, one in each list, whose grey level identifies the list."""
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for i, (name, files) in enumerate(lists.items()):
        for texture in reversed(TEXTURES):
            files.append(f"{texture}/{texture}_{9 - i:04d}.jpg")
            picture(root / "dtd" / "dtd" / "images" / files[-1], 40 * (i + 1))
        write(root / "dtd" / "dtd" / "labels" / f"{name}1.txt", "\n".join(files) + "\n")
    return lists


def sun_paths() -> list[str]:
    """The classes as in the published lists; one is a folder inside another."""
    places = [f"/{name[0]}/{name[2:]}" for name in SUN_FOLDERS]
    places[7] = "/b/place/006"  # b_place_006 in the folders of the public projects
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
    """A maker of the public projects' layout, moved up from `folder` into the root."""

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


# --- miniatures of the hub's data sets


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
        sizes = [f"    {key}: {len(ids)}" for key in ("num_bytes", "num_examples")]
        lines += [f"  - name: {split}", *sizes]
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
    """Puts a data set on a hub that is a folder, with a superfluous split."""
    entry = PUBLIC_SETS[name]
    assert entry.hub is not None
    folder = (entry.hub.files or "data/{}").rpartition("/")[0]
    features = class_features(library, names, image, entry.hub.label or "label")
    if entry.hub.label:
        features["coarse_label"] = library.ClassLabel(names=list(names))
    splits = {"train": ids, entry.hub.test: ids[:2], "contrast": ids[:1]}
    to_parquet(library, root / folder, features, splits)
    readme = card(name, entry.hub.config or "default", folder, splits)
    write(root / "README.md", readme)
    local = replace(entry, hub=replace(entry.hub, repo=str(root)))
    patch.setitem(CLIP8_SETS if name in CLIP8_SETS else CLIP20_SETS, name, local)
    return local


# --- folders and torchvision


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_s_layout_is_read_unless_the_folders_exist(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    for folder, makers in (("a", MAKERS), ("b", TORCHVISION)):
        (tmp_path / folder).mkdir()
        makers[name](tmp_path / folder, monkeypatch)
    entry = CLIP8_SETS[name]
    ours = load_public(name, entry, tmp_path / "a", "folder")
    for source in ("auto", "torchvision"):
        theirs = load_public(name, entry, tmp_path / "b", source)
        assert (ours.source, theirs.source) == ("folder", "torchvision")
        assert theirs.classnames == ours.classnames or name == "SUN397"
        for split in ("train", "test"):
            assert set(labels(getattr(theirs, split))) == set(labels(getattr(ours, split)))
    with pytest.raises(MissingFileError, match="is not complete"):
        load_public(name, entry, tmp_path / "b", "folder")
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    assert load_public(name, entry, tmp_path / "b").source == "folder"


@pytest.mark.parametrize("name", SAME)
def test_a_layout_that_both_sources_share_is_read_as_folder(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    assert CLIP8_SETS[name].torchvision == "same"
    MAKERS[name](tmp_path, monkeypatch)
    assert load_public(name, CLIP8_SETS[name], tmp_path, "torchvision").source == "folder"


def test_dtd_of_torchvision_is_partition_one_in_the_order_of_folders(tmp_path: Path) -> None:
    """The published validation split depends on this order."""
    lists = dtd_lists(tmp_path / "theirs")
    splits: Any = load_public("DTD", CLIP8_SETS["DTD"], tmp_path / "theirs", "torchvision")
    assert split_ids(splits.train) == sorted([*lists["train"], *lists["val"]])
    assert split_ids(splits.test) == sorted(lists["test"])
    assert levels(splits.train) == [80, 40] * 47 and levels(splits.test) == [120] * 47
    assert labels(splits.train) == [label for label in range(47) for _ in range(2)]
    for split, pictures in (("train", splits.train), ("val", splits.train), ("test", splits.test)):
        theirs = torchvision_sets.DTD(tmp_path / "theirs", split)
        paths = dict(zip(map(str, theirs._image_files), theirs._labels, strict=True))
        assert paths.items() <= dict(pictures.samples).items()

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
    splits: Any = load_public("SUN397", CLIP8_SETS["SUN397"], tmp_path)
    assert labels(splits.train) == labels(splits.test) == [0, *range(397)]
    assert levels(splits.train) == [40] * 398 and levels(splits.test) == [80] * 398
    assert splits.classnames[:2] == ("abbey", "place 000")
    assert splits.classnames[7] == "place 006" and splits.classnames[-1] == "youth hostel"
    assert splits.train[0][0].mode == "RGB"
    theirs = torchvision_sets.SUN397(tmp_path)
    names = dict(zip(map(str, theirs._image_files), theirs._labels, strict=True))
    for path, label in splits.train.samples:
        place = theirs.classes[names[path]].replace("/", " ").replace("_", " ")
        assert place == splits.classnames[label]


def test_invalid_lists_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    make_sun397(tmp_path, monkeypatch)
    listing = tmp_path / "SUN397" / "Training_01.txt"
    text = listing.read_text()
    leak = "a/abbey/sun_testing.jpg and .*/sun_testing.jpg are the same image in two splits"
    outside = r"Training_01.txt is refused: it names 'a/\.\./\.\./\.\./x\.jpg', which leads out"
    cases: list[tuple[bytes | None, type[UsageError], str]] = [
        (re.sub("/y/.*", "", text).encode(), UsageError, "expected 397 classes .* got 396"),
        (f"{text}/a/abbey/0.jpg".encode(), MissingFileError, "399 images .*, 1 are .*/abbey/0"),
        (f"{text}/a/abbey/sun_testing.jpg".encode(), UsageError, leak),
        (f"{text}/a/../../../x.jpg".encode(), UsageError, outside),
        (text.encode("utf-16"), UsageError, "Training_01.txt cannot be read as a text in UTF-8"),
        (None, MissingFileError, "Training_01.txt does not exist.*official partitions"),
    ]
    for content, error, message in cases:
        listing.unlink() if content is None else listing.write_bytes(content)
        with pytest.raises(error, match=message):
            load_public("SUN397", CLIP8_SETS["SUN397"], tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("EuroSAT", "torchvision", "no training and test split.*EuroSAT_splits"),
        ("RESISC45", "torchvision", "RESISC45 is not one of torchvision's"),
        ("TinyImageNet", "torchvision", "TinyImageNet is not one of torchvision's"),
        ("ImageNet", "hub", "ImageNet is not available from the hub"),
        ("DTD", "hubs", "unknown data source 'hubs'; choose from hub, "),
    ],
)
def test_a_source_without_the_data_set_is_refused(
    name: str, source: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        get_dataset(name, None, tmp_path, data_source=source)


# --- the order of the sources


@pytest.fixture
def requested(monkeypatch: Patch) -> list[str]:
    """The repositories requested from a hub that has all data sets."""
    seen: list[str] = []

    def load(name: str, entry: HubSet) -> Splits:
        seen.append(entry.repo)
        levels = np.arange(120, dtype=np.uint8).reshape(2, 20, 1, 1, 3)
        train, test = (ArrayPictures(images, np.arange(20)) for images in levels)
        return Splits(train, test, entry.classnames)

    monkeypatch.setattr("tangent_arithmetic.data.sources.load_hub", load)
    return seen


def test_the_hub_comes_last(requested: list[str], tmp_path: Path, monkeypatch: Patch) -> None:
    dtd_lists(tmp_path)
    assert load_public("DTD", CLIP8_SETS["DTD"], tmp_path).source == "torchvision"
    assert requested == []
    assert load_public("MNIST", CLIP8_SETS["MNIST"], tmp_path).source == "hub"
    assert requested == ["ylecun/mnist"]
    assert load_public("DTD", CLIP8_SETS["DTD"], tmp_path, "hub").source == "hub"
    assert requested == ["ylecun/mnist", "tanganke/dtd"]
    assert get_dataset("MNISTVal", None, tmp_path).source == "hub"
    with pytest.raises(MissingFileError, match="MNIST is not complete"):
        get_dataset("MNISTVal", None, tmp_path, data_source="folder")


@pytest.mark.parametrize(
    ("name", "part"),
    [("DTD", "dtd/val"), ("SVHN", "svhn/test_32x32.mat"), ("STL10", "stl10/stl10_binary")],
)
def test_an_incomplete_data_set_is_an_error_and_no_other_source_is_tried(
    name: str, part: str, requested: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    path = tmp_path / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if name == "DTD":
        dtd_lists(tmp_path)
    with pytest.raises(MissingFileError, match=rf"{name} is not complete: .* does not exist"):
        load_public(name, CLIP8_SETS[name], tmp_path)
    assert requested == []


def test_one_error_lists_what_each_source_expects(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        load_public("DTD", CLIP8_SETS["DTD"], tmp_path)
    first, folder, torchvision, hub, last = str(caught.value).splitlines()
    assert first == "no source has data set DTD."
    assert folder.startswith(f"  folder: data set DTD is not complete: {tmp_path}/dtd/train does")
    assert torchvision.startswith("  torchvision: ") and "dtd/dtd/labels/train1.txt" in torchvision
    assert hub.startswith("  hub: data set DTD: tanganke/dtd ")
    assert last.startswith("Provide one of these. ") and "--data-location" in last
    assert "--suite=embedded" in last and "--suite=embedded" not in folder


def test_the_embedded_suite_ignores_the_source(args: MakeArgs) -> None:
    settings = args(data_source="hub")
    hashes = Run.of(settings).data.split_hashes(["MNISTVal", "MNIST"])
    assert None not in hashes.values() and len(set(hashes.values())) == 2
    data = get_dataset("MNISTVal", None, ".", suite="embedded", cache_dir=settings.cache_dir)
    assert split_record(data)["source"] == "embedded"


# --- the hub


@pytest.mark.parametrize("name", ON_HUB)
def test_labels_of_the_hub_are_ours_whatever_their_order(
    name: str, hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    """There the classes are in reverse order and spelt in another way."""
    own = PUBLIC_SETS[name].hub
    assert own is not None
    count = len(own.classnames)
    names = [phrase.upper().replace(" ", "_") for phrase in reversed(own.classnames)]
    ids = [0, 1, count - 1, count // 2]
    on_hub(hub, tmp_path / "repo", monkeypatch, name, names, ids, "img")
    data = get_dataset(name, None, tmp_path / "nothing", suite="clip20")
    assert data.source == "hub" and data.classnames == own.classnames
    assert labels(data.train) == [count - 1 - i for i in ids] == labels_of(data.train).tolist()
    assert labels(data.test) == [count - 1, count - 2]
    assert levels(data.train) == [0, 1, 2, 3] and data.train[0][0].mode == "RGB"


def test_aliases_stand_for_their_classes() -> None:
    cifar, land = CLIP8_SETS["CIFAR100"].hub, CLIP8_SETS["EuroSAT"].hub
    assert cifar is not None and land is not None
    assert match_classes("CIFAR100", cifar, list(cifar.classnames)) == tuple(range(100))
    theirs = ["cra" if name == "crab" else name for name in cifar.classnames]
    assert match_classes("CIFAR100", cifar, theirs) == tuple(range(100))
    assert match_classes("EuroSAT", land, [*land.aliases]) == tuple(range(10))
    kana = CLIP20_SETS["KMNIST"].hub
    assert kana is not None
    assert match_classes("KMNIST", kana, list("おきすつなはまやれを")) == tuple(range(10))


ON_HUB_ONLY = """
    n02666347 n03373237 n04465666 n04598010 n07056680 n07646821 n07647870 n07657664 n07975909
    n08496334 n08620881 n08742578 n12520864 n13001041 n13652335 n13652994 n13719102 n14991210
"""
NAMES_THERE = ["abacus", "fly", "tractor", "wooden spoon", "reel", "goose", "drumstick", "plate"]
NAMES_THERE += ["bee", "apron", "pole", "Chihuahua", "broom", "mushroom", "nail", "chain", "slug"]
NAMES_THERE += ["orange"]


def test_other_synsets_of_the_hub_are_the_same_classes() -> None:
    """There the classes are in the order of these synsets, as FusionBench lists them."""
    tiny = CLIP20_SETS["TinyImageNet"].hub
    assert tiny is not None
    assert match_classes("TinyImageNet", tiny, [*tiny_imagenet.NAMES]) == tuple(range(200))
    others = dict(zip(ON_HUB_ONLY.split(), NAMES_THERE, strict=True))
    same = {s: name for s, name in tiny_imagenet.NAMES.items() if name not in NAMES_THERE}
    theirs = dict(sorted({**same, **others}.items()))
    assert len(theirs) == 200
    labels = match_classes("TinyImageNet", tiny, [*theirs])
    assert [tiny.classnames[label] for label in labels] == [*theirs.values()]


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


@pytest.mark.parametrize(
    ("columns", "test", "message"),
    [
        ({"label": "int64"}, [1], "one column of type ClassLabel in .*, got none of the columns i"),
        ({"mask": None}, [1], "expected one column of type Image in .*, got image, mask of"),
        ({"image": "int64"}, [1], "expected one column of type Image in .*, got none of"),
        ({}, None, "has the splits train, expected train and test; test is missing"),
        # the library gives -1 for secret labels, which as an index is the last class
        ({}, [3, -1], "row 1 of .* has label -1 .* expected 0 to 9: this"),
        ({}, [3, None], "row 1 of .* has label None .* expected 0 to 9: this"),
    ],
)
def test_invalid_columns_and_rows_are_refused(
    columns: dict[str, str | None], test: Any, message: str, hub: Any, tmp_path: Path
) -> None:
    features = class_features(hub, list("0123456789"), "image", "label")
    features |= {name: hub.Value(kind) if kind else hub.Image() for name, kind in columns.items()}
    splits = {"train": [0, 1]} if test is None else {"train": [0, 1], "test": test}
    to_parquet(hub, tmp_path / "repo" / "data", features, splits)
    entry = replace(CLIP8_SETS["MNIST"], hub=HubSet(str(tmp_path / "repo"), tuple("0123456789")))
    with pytest.raises(UsageError, match=message) as caught:
        load_public("MNIST", entry, tmp_path, "auto")
    assert not isinstance(caught.value, MissingFileError)


@pytest.mark.parametrize("stored", [True, False], ids=["in the rows", "beside them"])
@pytest.mark.parametrize(
    ("numbers", "refused"), [(range(8), True), ([5, 4, 2], True), ([1, 8, 9, 10], False)]
)
def test_rows_in_two_splits_are_refused(
    numbers: Sequence[int], refused: bool, stored: bool, hub: Any, tmp_path: Path
) -> None:
    """Unless they are few, as in some published data sets."""
    features = hub.Features(class_features(hub, list("0123456789"), "image", "label"))
    paths = [tmp_path / f"{level}.png" for level in range(12)]
    for level, path in enumerate(paths):
        picture(path, level)
    images = [{"bytes": path.read_bytes() if stored else None, "path": str(path)} for path in paths]

    def rows(chosen: Sequence[int]) -> HubPictures:
        columns = {"image": [images[i] for i in chosen], "label": [i % 10 for i in chosen]}
        table = hub.Dataset.from_dict(columns, features=features)
        return HubPictures(table, "image", "label", tuple(range(10)))

    splits = Splits(rows(range(8)), rows(numbers), tuple("0123456789"))
    assert levels(splits.train) == list(range(8))
    entry = PublicSet(Layout(lambda location: splits, ()))
    if not refused:
        assert load_public("X", entry, tmp_path, "folder").test == splits.test
        return
    with pytest.raises(UsageError, match=r"HubPictures are the same image in two splits \(of \d"):
        load_public("X", entry, tmp_path, "folder")


def test_a_missing_library_names_the_extra_to_install(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r'tanganke/dtd needs the library datasets, .* \(pip install -e "\.\[hub\]"\)'
    for source in ("hub", "auto"):
        with pytest.raises(MissingFileError, match=message):
            load_public("DTD", CLIP8_SETS["DTD"], tmp_path, source)


def test_offline_mode_is_named(hub: Any, tmp_path: Path) -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE  # see conftest
    message = r"tanganke/dtd cannot be loaded \(ConnectionError: .*HF_HUB_OFFLINE is set: unset it"
    for source in ("hub", "auto"):
        with pytest.raises(MissingFileError, match=message):
            load_public("DTD", CLIP8_SETS["DTD"], tmp_path, source)


def test_rows_have_an_identity_and_go_to_workers(
    hub: Any, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS["MNIST"](tmp_path, monkeypatch)
    entry = on_hub(hub, tmp_path / "repo", monkeypatch, "MNIST", "0123456789", [5, 0, 4, 1])
    first, again = (load_public("MNIST", entry, tmp_path, "hub") for _ in range(2))
    assert isinstance(first.train, HubPictures)
    assert fingerprint(first.train) == fingerprint(again.train) is not None
    assert fingerprint(first.test) != fingerprint(first.train)
    shuffled = replace(first.train, labels=tuple(reversed(first.train.labels)))
    assert fingerprint(shuffled) != fingerprint(first.train)
    assert labels(pickle.loads(pickle.dumps(first.train))) == [5, 0, 4, 1]
    batches = EvalBatches(first.train, np.array, 2, 2)
    assert torch.cat([labels for _, labels in batches]).tolist() == [5, 0, 4, 1]
    files = load_public("MNIST", entry, tmp_path, "folder").train
    assert labels(files) == [5, 0, 4, 1]
    assert split_ids(files) == ["0", "1", "2", "3"]  # rows may be in another order than files
    assert split_ids(first.train) == ["hub/0", "hub/1", "hub/2", "hub/3"]
