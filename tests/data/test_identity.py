"""What a split holds, as a hash: of its pictures, its labels and their order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import FakeData, ImageFolder

from tangent_arithmetic.data.base import ArrayPictures, Pictures, SubsetPictures
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.clip8.folders import ClassFolders, LazyPictures
from tangent_arithmetic.data.identity import (
    fingerprint,
    labels_of,
    pictures_hash,
    split_hash,
    times_hash,
)
from tangent_arithmetic.data.registry import hold_out
from tests.data.test_clip8 import made
from tests.miniatures import MAKERS, Opaque, picture

ROOT = Path(__file__).resolve().parent.parent.parent
Patch = pytest.MonkeyPatch
ARRAYS = ("CIFAR10", "CIFAR100", "MNIST", "STL10", "SVHN")
FILES = ("Cars", "DTD", "EuroSAT", "GTSRB", "RESISC45")
LETTERS = ClassFolders("Letters", "letters/{a,b}", 2, "[a-z]")


def arrays() -> ArrayPictures:
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    return ArrayPictures(images, np.array([2, 0, 1, 0]))


def tree(root: Path) -> Path:
    """Two classes of small PNG files."""
    for i, name in enumerate(("a/1.png", "a/2.png", "b/1.png")):
        picture(root / name, 40 * i)
    return root


def folder(root: Path) -> ImageFolder:
    return ImageFolder(tree(root))


# pictures in memory


def another_pixel(p: ArrayPictures) -> None:
    p.images[2, 3, 1, 0] ^= 1


def another_last_pixel(p: ArrayPictures) -> None:
    p.images[-1, -1, -1, -1] ^= 128


def another_label(p: ArrayPictures) -> None:
    p.labels[3] = 1


def another_order(p: ArrayPictures) -> None:
    p.images[:], p.labels[:] = p.images[::-1].copy(), p.labels[::-1].copy()


def labels_in_another_order(p: ArrayPictures) -> None:
    p.labels[:] = p.labels[::-1].copy()


@pytest.mark.parametrize(
    "change",
    [another_pixel, another_last_pixel, another_label, another_order, labels_in_another_order],
)
def test_arrays_with_a_difference_differ(change: Callable[[ArrayPictures], None]) -> None:
    changed = arrays()
    change(changed)
    assert fingerprint(changed) != fingerprint(arrays())


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (2, 12, 5, 3), (8, 3, 5, 3)])
def test_the_same_bytes_in_another_shape_differ(shape: tuple[int, ...]) -> None:
    own = arrays()
    assert fingerprint(ArrayPictures(own.images.reshape(shape), own.labels)) != fingerprint(own)


def test_a_part_of_arrays_differs() -> None:
    own = arrays()
    assert fingerprint(ArrayPictures(own.images[:3], own.labels[:3])) != fingerprint(own)


def test_equal_arrays_have_one_hash_whatever_their_layout() -> None:
    own = arrays()
    expected = fingerprint(own)
    assert isinstance(expected, str) and len(expected) == 64 and int(expected, 16)
    assert fingerprint(arrays()) == expected
    strided = ArrayPictures(np.asfortranarray(own.images), np.repeat(own.labels, 2)[::2])
    assert not strided.images.flags.c_contiguous
    assert fingerprint(strided) == expected


# subsets


def test_subsets_differ_in_indices_their_order_and_what_they_are_of() -> None:
    changed = arrays()
    another_label(changed)
    hashes = [
        fingerprint(subset)
        for subset in (
            arrays(),
            SubsetPictures(arrays(), [0, 1, 2, 3]),
            SubsetPictures(arrays(), [0, 1, 2]),
            SubsetPictures(arrays(), [0, 2, 1]),
            SubsetPictures(arrays(), [0, 1, 3]),
            SubsetPictures(changed, [0, 1, 2]),
            SubsetPictures(SubsetPictures(arrays(), [0, 1, 2]), [0, 1]),
            SubsetPictures(SubsetPictures(arrays(), [0, 1, 3]), [0, 1]),
        )
    ]
    assert None not in hashes and len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("indices", [np.array([0, 1, 2]), range(3), (0, 1, 2)])
def test_the_same_indices_are_one_subset(indices: Any) -> None:
    own = fingerprint(SubsetPictures(arrays(), [0, 1, 2]))
    assert fingerprint(SubsetPictures(arrays(), indices)) == own


def test_a_held_out_split_has_an_identity(tmp_path: Path, monkeypatch: Patch) -> None:
    splits = hold_out(made("MNIST", tmp_path, monkeypatch), 0.5, 5000)
    assert splits.val is not None
    hashes = {fingerprint(part) for part in (splits.train, splits.val, splits.test)}
    assert None not in hashes and len(hashes) == 3


# files


@pytest.mark.parametrize("kind", ["listed", "lazy"])
@pytest.mark.parametrize("change", ["size", "time", "name", "one more", "one less"])
def test_files_with_a_difference_differ(tmp_path: Path, kind: str, change: str) -> None:
    def load() -> Pictures:
        return LazyPictures(LETTERS, tmp_path) if kind == "lazy" else ImageFolder(tmp_path)

    tree(tmp_path)
    before = fingerprint(load())
    assert before is not None
    path = tmp_path / "a" / "2.png"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if change == "size":
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, ns=times)
    elif change == "time":
        os.utime(path, ns=(times[0], times[1] + 1_000_000))
    elif change == "name":
        path.rename(path.with_name("3.png"))
    elif change == "one more":
        picture(path.with_name("3.png"), 9)
    else:
        path.unlink()
    assert fingerprint(load()) != before


def test_a_file_that_moves_to_another_class_differs(tmp_path: Path) -> None:
    before = fingerprint(folder(tmp_path))
    (tmp_path / "a" / "2.png").rename(tmp_path / "b" / "2.png")
    assert fingerprint(ImageFolder(tmp_path)) != before


@pytest.mark.parametrize("change", ["label", "order"])
def test_files_in_another_order_or_with_another_label_differ(tmp_path: Path, change: str) -> None:
    pictures = folder(tmp_path)
    before = fingerprint(pictures)
    if change == "order":
        pictures.samples.reverse()
    else:
        pictures.samples[0] = (pictures.samples[0][0], 1)
    assert fingerprint(pictures) != before


def test_no_picture_is_read(tmp_path: Path, monkeypatch: Patch) -> None:
    listed, lazy = folder(tmp_path), LazyPictures(LETTERS, tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert fingerprint(listed) == fingerprint(lazy) is not None


def test_a_lazy_listing_is_identified_by_the_pictures_that_it_has(tmp_path: Path) -> None:
    # listing ImageNet takes minutes, and a picture that comes later is not one of the data set's
    lazy = LazyPictures(LETTERS, tree(tmp_path))
    before, count = fingerprint(lazy), len(lazy)
    picture(tmp_path / "a" / "9.png", 9)
    assert len(lazy) == count
    assert fingerprint(lazy) == before


# the readers of the suite


@pytest.mark.parametrize("name", [*ARRAYS, *FILES])
def test_each_set_has_an_identity_that_two_loads_share(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    first = made(name, tmp_path, monkeypatch)
    second = CLIP8_SETS[name](tmp_path)
    hashes = [fingerprint(first.train), fingerprint(first.test)]
    assert None not in hashes and hashes[0] != hashes[1]
    assert [fingerprint(second.train), fingerprint(second.test)] == hashes


@pytest.mark.parametrize("name", [*ARRAYS, *FILES])
def test_labels_are_those_of_the_pictures(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    splits = made(name, tmp_path, monkeypatch)
    for pictures in (splits.train, splits.test, SubsetPictures(splits.test, [1, 0])):
        found = labels_of(pictures)
        assert found.dtype == np.int64
        assert found.tolist() == [pictures[i][1] for i in range(len(pictures))]


def test_labels_of_a_lazy_listing_and_of_an_unknown_kind(tmp_path: Path) -> None:
    assert labels_of(LazyPictures(LETTERS, tree(tmp_path))).tolist() == [0, 0, 1]
    unknown = FakeData(5, (3, 8, 8), 4)
    assert labels_of(unknown).tolist() == [int(unknown[i][1]) for i in range(5)]


def own_labels(pictures: Any) -> Any:
    return pictures.targets if hasattr(pictures, "targets") else pictures.labels


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_torchvision_with_a_difference_differ(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    def load() -> Any:
        return CLIP8_SETS[name](tmp_path).test

    before = fingerprint(made(name, tmp_path, monkeypatch).test)
    pixel = load()
    pixel.data[(-1,) * pixel.data.ndim] += 1
    label = load()
    own_labels(label)[-1] = (own_labels(label)[-1] + 1) % 10
    swapped = load()
    first, second = (int(value) for value in own_labels(swapped)[:2])
    assert first != second
    own_labels(swapped)[0], own_labels(swapped)[1] = second, first
    hashes = [fingerprint(changed) for changed in (pixel, label, swapped)]
    assert None not in hashes
    assert before not in hashes and len(set(hashes)) == 3


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
def test_a_replaced_picture_changes_its_split_alone(
    name: str, file: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    splits = made(name, tmp_path, monkeypatch)
    train, test = fingerprint(splits.train), fingerprint(splits.test)
    path = tmp_path / file
    path.write_bytes(path.read_bytes() + b" ")
    again = CLIP8_SETS[name](tmp_path)
    assert fingerprint(again.train) == train
    assert fingerprint(again.test) != test


@pytest.mark.parametrize("name", ["Cars", "GTSRB"])
def test_labels_of_a_table_count(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    pictures: Any = made(name, tmp_path, monkeypatch).test
    before = fingerprint(pictures)
    path, label = pictures.samples[-1]
    pictures.samples[-1] = (path, label + 1)
    assert fingerprint(pictures) != before


def test_each_set_of_the_suite_is_tested_here_or_is_folders() -> None:
    """SUN397 and ImageNet are folders of hundreds of classes; DTD stands for them."""
    assert {*ARRAYS, *FILES, "SUN397", "ImageNet"} == MAKERS.keys()


ELSEWHERE = """
import sys
from pathlib import Path
import numpy as np
from torchvision.datasets import ImageFolder
from tangent_arithmetic.data.base import ArrayPictures, SubsetPictures
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.identity import fingerprint, labels_of
from tangent_arithmetic.data.identity import pictures_hash, split_hash, times_hash
images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
arrays = ArrayPictures(images, np.array([2, 0, 1, 0]))
root = Path(sys.argv[1])
print(fingerprint(arrays))
print(fingerprint(SubsetPictures(arrays, [2, 0])))
print(fingerprint(ImageFolder(root / "letters")))
for name in ("MNIST", "GTSRB", "Cars"):
    print(fingerprint(CLIP8_SETS[name](root).test))
"""


def test_another_process_finds_the_same(tmp_path: Path, monkeypatch: Patch) -> None:
    own = [
        fingerprint(pictures)
        for pictures in (
            arrays(),
            SubsetPictures(arrays(), [2, 0]),
            folder(tmp_path / "letters"),
            *(made(name, tmp_path, monkeypatch).test for name in ("MNIST", "GTSRB", "Cars")),
        )
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == own


# what has none


class Unknown:
    """Pictures that do not say what they are."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8)), 0


class WithoutLabels(Unknown):
    """Pictures whose labels are nowhere to be found."""

    data = np.zeros((1, 8, 8, 3), dtype=np.uint8)


class WithoutPictures(Unknown):
    """Labels whose pictures are nowhere to be found."""

    targets = (0,)


@pytest.mark.parametrize(
    "pictures", [Unknown(), WithoutLabels(), WithoutPictures(), FakeData(size=2)]
)
def test_an_unknown_kind_has_no_identity(pictures: Pictures) -> None:
    assert fingerprint(pictures) is None
    assert fingerprint(SubsetPictures(pictures, [0])) is None


# the same split anywhere


def test_a_split_is_the_same_in_another_place(tmp_path: Path) -> None:
    """Unlike the fingerprint, which is of these very files."""
    one, other = folder(tmp_path / "one"), folder(tmp_path / "deep" / "er")
    assert split_hash(one) == split_hash(other) is not None
    assert fingerprint(one) != fingerprint(other)
    picture(tmp_path / "one" / "a" / "1.png", 255)  # another content under the same name
    assert split_hash(ImageFolder(tmp_path / "one")) == split_hash(other)


def test_another_name_label_or_order_is_another_split(tmp_path: Path) -> None:
    whole = folder(tmp_path / "one")
    found = {split_hash(whole), split_hash(SubsetPictures(whole, [0, 1]))}
    found.add(split_hash(SubsetPictures(whole, [1, 0])))
    (tmp_path / "one" / "a" / "1.png").rename(tmp_path / "one" / "a" / "0.png")
    found.add(split_hash(ImageFolder(tmp_path / "one")))
    (tmp_path / "one" / "b").rename(tmp_path / "one" / "c")
    found.add(split_hash(ImageFolder(tmp_path / "one")))
    assert len(found) == 5


@pytest.mark.parametrize("name", [*ARRAYS, *FILES])
def test_splits_of_the_public_sets_are_recognised(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    hashes = []
    for place in "ab":
        (tmp_path / place).mkdir()
        hashes.append(split_hash(made(name, tmp_path / place, monkeypatch).train))
    assert hashes[0] == hashes[1] is not None


# what the pictures hold, wherever they are


def other_inside(root: Path) -> None:
    content = bytearray((root / "a/2.png").read_bytes())
    content[-20] ^= 1  # of the same size
    (root / "a/2.png").write_bytes(content)


def renamed(root: Path) -> None:
    (root / "a/1.png").rename(root / "a/3.png")


def longer(root: Path) -> None:
    (root / "b/1.png").write_bytes((root / "b/1.png").read_bytes() + b"x")


@pytest.mark.parametrize("change", [other_inside, renamed, longer])
def test_files_that_hold_something_else_differ(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    before = pictures_hash(folder(tmp_path / "one"))
    assert pictures_hash(folder(tmp_path / "another place")) == before
    change(tmp_path / "one")
    assert pictures_hash(ImageFolder(tmp_path / "one")) != before


def test_times_count_where_they_are_asked_for(tmp_path: Path) -> None:
    pictures = folder(tmp_path)
    times, content = times_hash(pictures), pictures_hash(pictures)
    os.utime(tmp_path / "a/1.png", ns=(1, 1))
    assert pictures_hash(pictures) == content and times_hash(pictures) != times
    assert times_hash(SubsetPictures(pictures, [1, 2])) != times_hash(pictures)
    assert times_hash(arrays()) is None


def test_a_part_of_files_holds_something_else(tmp_path: Path) -> None:
    pictures = folder(tmp_path)
    parts = [SubsetPictures(pictures, indices) for indices in ([0, 1], [1, 0], [0, 2])]
    assert len({pictures_hash(part) for part in (pictures, *parts)}) == 4


@pytest.mark.parametrize("change", [another_pixel, another_label, another_order])
def test_what_pictures_of_other_kinds_hold_is_decoded(
    change: Callable[[ArrayPictures], None],
) -> None:
    changed = arrays()
    change(changed)
    assert pictures_hash(Opaque(arrays())) == pictures_hash(Opaque(arrays()))
    assert pictures_hash(Opaque(changed)) != pictures_hash(Opaque(arrays()))
    assert pictures_hash(changed) != pictures_hash(arrays())


def test_names_that_are_no_utf_8_have_hashes(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff.png")
    (tmp_path / "a").mkdir()
    try:
        picture(tmp_path / "a" / odd, 3)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    pictures = ImageFolder(tmp_path)
    assert len({fingerprint(pictures), split_hash(pictures), pictures_hash(pictures)}) == 3
