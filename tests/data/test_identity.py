"""Hashes that identify the images of a split, their labels and their order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import FakeData, ImageFolder

from tangent_arithmetic.data.base import ArrayPictures, Pictures, SubsetPictures
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.clip8.folders import ClassFolders
from tangent_arithmetic.data.clip20 import PUBLIC_SETS
from tangent_arithmetic.data.files import LazyPictures
from tangent_arithmetic.data.identity import (
    fingerprint,
    labels_of,
    pictures_hash,
    split_hash,
    split_ids,
    times_hash,
)
from tangent_arithmetic.data.registry import get_dataset, split_record
from tests.data.test_clip20 import make_and_load
from tests.miniatures import Opaque, picture, write

Patch = pytest.MonkeyPatch
ARRAYS = ("CIFAR10", "CIFAR100", "MNIST", "STL10", "SVHN")
LETTERS = ClassFolders("Letters", "letters/{a,b}", 2, "[a-z]")


def arrays() -> ArrayPictures:
    images = (np.arange(360) * 7 % 251).astype(np.uint8).reshape(4, 6, 5, 3)
    return ArrayPictures(images, np.array([2, 0, 1, 0]))


def part(indices: Any, pictures: Pictures | None = None) -> SubsetPictures:
    return SubsetPictures(pictures or arrays(), indices)


def folder(root: Path) -> ImageFolder:
    """Two classes of small PNG files."""
    for i, name in enumerate(("a/1.png", "a/2.png", "b/1.png")):
        picture(root / name, 40 * i)
    return ImageFolder(root)


def lazy(root: Path) -> LazyPictures:
    folder(root)
    return LazyPictures(partial(LETTERS.pictures, root))


# --- images in memory


def another_pixel(p: ArrayPictures) -> None:
    p.images[2, 3, 1, 0] ^= 1


def another_last_pixel(p: ArrayPictures) -> None:
    p.images[-1, -1, -1, -1] ^= 128


def another_label(p: ArrayPictures) -> None:
    p.labels[3] = 1


def another_order(p: ArrayPictures) -> None:
    p.images[:], p.labels[:] = p.images[::-1].copy(), p.labels[::-1].copy()


def another_order_of_labels(p: ArrayPictures) -> None:
    p.labels[:] = p.labels[::-1].copy()


CHANGES = [another_pixel, another_last_pixel, another_label, another_order, another_order_of_labels]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_to_arrays_changes_the_hash(change: Callable[[ArrayPictures], None]) -> None:
    """The same holds for other types of data set, which `pictures_hash` decodes."""
    changed = arrays()
    change(changed)
    assert fingerprint(changed) != fingerprint(arrays())
    assert pictures_hash(changed) != pictures_hash(arrays())
    assert pictures_hash(Opaque(changed)) != pictures_hash(Opaque(arrays()))
    assert pictures_hash(Opaque(arrays())) == pictures_hash(Opaque(arrays()))


def test_shape_and_number_count_but_not_the_memory_layout() -> None:
    images, labels = arrays().images, arrays().labels
    others = [ArrayPictures(images[:3], labels[:3])]
    for shape in ((4, 5, 6, 3), (2, 12, 5, 3), (8, 3, 5, 3)):
        others.append(ArrayPictures(images.reshape(shape), labels))
    hashes = {fingerprint(pictures) for pictures in (arrays(), *others)}
    assert None not in hashes and len(hashes) == 5
    strided = ArrayPictures(np.asfortranarray(images), np.repeat(labels, 2)[::2])
    assert not strided.images.flags.c_contiguous
    assert fingerprint(strided) == fingerprint(arrays())


def test_subsets_differ_in_indices_order_and_data_set() -> None:
    changed = arrays()
    another_label(changed)
    subsets = [part(indices) for indices in ([0, 1, 2, 3], [0, 1, 2], [0, 2, 1], [0, 1, 3])]
    subsets += [part([0, 1, 2], changed), part([0, 1], subsets[1]), part([0, 1], subsets[3])]
    everything: list[Pictures] = [arrays(), *subsets]
    hashes = {fingerprint(pictures) for pictures in everything}
    assert None not in hashes and len(hashes) == 8
    for indices in (np.array([0, 1, 2]), range(3), (0, 1, 2)):
        assert fingerprint(part(indices)) == fingerprint(part([0, 1, 2]))


def test_hashes_are_the_same_in_every_process_and_version(tmp_path: Path) -> None:
    """Caches and checkpoints keep them."""
    for file in ("a/1.png", "a/2.png", "b/1.png"):
        write(tmp_path / file, f"content of {file}")
    files = ImageFolder(tmp_path)
    hashes = [fingerprint(arrays()), fingerprint(part([2, 0])), split_hash(files)]
    assert [str(digest)[:16] for digest in (*hashes, pictures_hash(files))] == [
        "fb48c1ca9ef367d5",
        "c13457c9e6727ce6",
        "64c47f1b9be1b20e",
        "4c7d4eb086fbbc2b",
    ]


# --- files


def longer(path: Path) -> None:
    """Another size at the same time."""
    facts = path.stat()
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def later(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000))


def renamed(path: Path) -> None:
    path.rename(path.with_name("3.png"))


def added(path: Path) -> None:
    picture(path.with_name("3.png"), 9)


def moved_to_another_class(path: Path) -> None:
    path.rename(path.parent.parent / "b" / "2.png")


def another_byte(path: Path) -> None:
    """Another content of the same size."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("load", [folder, lazy])
@pytest.mark.parametrize(
    "change", [longer, later, renamed, added, Path.unlink, moved_to_another_class]
)
def test_every_change_to_files_changes_the_fingerprint(
    change: Callable[[Path], None], load: Callable[[Path], Pictures], tmp_path: Path
) -> None:
    before = fingerprint(load(tmp_path))
    change(tmp_path / "a" / "2.png")
    again: Pictures = ImageFolder(tmp_path)
    if load is lazy:
        again = LazyPictures(partial(LETTERS.pictures, tmp_path))
    assert fingerprint(again) != before is not None


def test_labels_and_order_of_files_count(tmp_path: Path) -> None:
    pictures = folder(tmp_path)
    hashes = [fingerprint(pictures)]
    pictures.samples.reverse()
    hashes.append(fingerprint(pictures))
    pictures.samples[0] = (pictures.samples[0][0], 0)
    assert len({*hashes, fingerprint(pictures)}) == 3


def test_a_fingerprint_of_files_reads_none(tmp_path: Path, monkeypatch: Patch) -> None:
    listed, later_listed = folder(tmp_path), lazy(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert fingerprint(listed) == fingerprint(later_listed) is not None


def test_a_lazy_data_set_keeps_its_first_listing(tmp_path: Path) -> None:
    pictures = lazy(tmp_path)
    assert labels_of(pictures).tolist() == [0, 0, 1]
    before = fingerprint(pictures)
    picture(tmp_path / "a" / "9.png", 9)
    assert len(pictures) == 3 and fingerprint(pictures) == before


# --- the public data sets


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_split_is_recognised_wherever_and_whenever_it_was_copied(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    roots = tmp_path / "here", tmp_path / "else" / "where"
    roots[0].mkdir()
    splits = make_and_load(name, roots[0], monkeypatch)
    hashes = [fingerprint(splits.train), fingerprint(splits.test)]
    assert None not in hashes and hashes[0] != hashes[1]
    again = PUBLIC_SETS[name](roots[0])
    assert [fingerprint(again.train), fingerprint(again.test)] == hashes
    shutil.copytree(roots[0], roots[1])
    for path in roots[1].rglob("*"):
        os.utime(path, (1, 1))
    records = [
        split_record(get_dataset(f"{name}Val", None, root, val_fraction=0.5, suite="clip20"))
        for root in roots
    ]
    assert records[0] == records[1]
    assert records[0]["dataset"] == name and records[0]["source"] == "folder"
    assert records[0]["train"] != records[0]["val"] and None not in records[0].values()


@pytest.mark.parametrize("name", ARRAYS)
def test_every_change_to_torchvision_s_arrays_changes_the_fingerprint(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    hashes = [fingerprint(make_and_load(name, tmp_path, monkeypatch).test)]
    for change in ("pixel", "label", "order"):
        pictures: Any = CLIP8_SETS[name](tmp_path).test
        labels = pictures.targets if hasattr(pictures, "targets") else pictures.labels
        if change == "pixel":
            pictures.data[(-1,) * pictures.data.ndim] += 1
        elif change == "label":
            labels[-1] = (labels[-1] + 1) % 10
        else:
            labels[0], labels[1] = int(labels[1]), int(labels[0])
        hashes.append(fingerprint(pictures))
    assert None not in hashes and len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Cars", "stanford_cars/cars_test/00002.jpg"),
        ("DTD", "dtd/val/woven/woven_80.jpg"),
        ("EuroSAT", "EuroSAT_splits/test/River/River_120.jpg"),
        ("GTSRB", "gtsrb/GTSRB/Final_Test/Images/00001.ppm"),
        ("RESISC45", "resisc45/NWPU-RESISC45/wetland/wetland_003.jpg"),
    ],
)
def test_a_replaced_picture_or_label_changes_its_split_alone(
    name: str, file: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    splits = make_and_load(name, tmp_path, monkeypatch)
    train, test = fingerprint(splits.train), fingerprint(splits.test)
    pictures: Any = splits.test
    path, label = pictures.samples[-1]
    pictures.samples[-1] = (path, label + 1)
    assert fingerprint(pictures) != test
    longer(tmp_path / file)
    again = CLIP8_SETS[name](tmp_path)
    assert fingerprint(again.train) == train and fingerprint(again.test) != test


# --- unknown types


class WithoutLabels(Opaque):
    data = np.zeros((1, 8, 8, 3), dtype=np.uint8)


class WithoutPictures(Opaque):
    targets = (0,)


@pytest.mark.parametrize(
    "pictures", [Opaque(arrays()), WithoutLabels(arrays()), WithoutPictures(arrays()), FakeData(2)]
)
def test_an_unknown_type_of_data_set_has_no_fingerprint_and_no_ids(pictures: Pictures) -> None:
    for unknown in (pictures, SubsetPictures(pictures, [0])):
        assert fingerprint(unknown) is None
        assert split_ids(unknown) is None and split_hash(unknown) is None


def test_labels_of_an_unknown_type_are_read_with_the_pictures() -> None:
    unknown = FakeData(5, (3, 8, 8), 4)
    assert labels_of(unknown).tolist() == [int(unknown[i][1]) for i in range(5)]


# --- hashes independent of the folder


def test_ids_of_files_are_paths_below_the_data_set(tmp_path: Path) -> None:
    """They identify the same split in another folder, and say nothing about the content."""
    pictures, other = folder(tmp_path / "one"), folder(tmp_path / "deep" / "er")
    assert split_ids(pictures) == split_ids(other) == ["a/1.png", "a/2.png", "b/1.png"]
    assert split_ids(part([2, 0], pictures)) == ["b/1.png", "a/1.png"]
    assert split_hash(part(range(3), pictures)) == split_hash(pictures) == split_hash(other)
    assert fingerprint(pictures) != fingerprint(other)
    picture(tmp_path / "one" / "a" / "1.png", 255)
    assert split_hash(ImageFolder(tmp_path / "one")) == split_hash(other)


def test_another_name_class_or_order_is_another_split(tmp_path: Path) -> None:
    whole = folder(tmp_path)
    hashes = {split_hash(p) for p in (whole, part([0, 1], whole), part([1, 0], whole))}
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "0.png")
    hashes.add(split_hash(ImageFolder(tmp_path)))
    (tmp_path / "b").rename(tmp_path / "c")
    hashes.add(split_hash(ImageFolder(tmp_path)))
    picture(tmp_path / "a" / "3.png", 9)
    hashes.add(split_hash(ImageFolder(tmp_path)))
    assert len(hashes) == 6


@pytest.mark.parametrize("change", [another_byte, renamed, longer])
def test_another_content_changes_the_hash_of_the_content(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    before = pictures_hash(folder(tmp_path / "one"))
    assert pictures_hash(folder(tmp_path / "another place")) == before
    change(tmp_path / "one" / "a" / "2.png")
    assert pictures_hash(ImageFolder(tmp_path / "one")) != before


def test_the_hash_of_times_notices_what_that_of_the_content_may_miss(tmp_path: Path) -> None:
    pictures = folder(tmp_path)
    times, content = times_hash(pictures), pictures_hash(pictures)
    os.utime(tmp_path / "a/1.png", ns=(1, 1))
    assert pictures_hash(pictures) == content and times_hash(pictures) != times
    assert times_hash(part([1, 2], pictures)) != times_hash(pictures)
    assert times_hash(arrays()) is None
    parts = [part(indices, pictures) for indices in ([0, 1], [1, 0], [0, 2])]
    assert len({pictures_hash(p) for p in (pictures, *parts)}) == 4


def test_file_names_that_are_not_utf_8_have_hashes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff.png")
    (tmp_path / "a").mkdir()
    try:
        picture(tmp_path / "a" / odd, 3)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    pictures = ImageFolder(tmp_path)
    assert len({fingerprint(pictures), split_hash(pictures), pictures_hash(pictures)}) == 3
