"""Files that are images of a data set, their order, and images in two splits."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tangent_arithmetic.data.base import ArrayPictures, Splits
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.files import EXTENSIONS, ListedPictures, class_folders, class_pictures
from tangent_arithmetic.data.leaks import refuse_shared
from tangent_arithmetic.data.sources import load_public
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.miniatures import MAKERS, SYNSETS, Patch, idx, picture, write

Caught = pytest.LogCaptureFixture


def files_of(pictures: ListedPictures) -> list[tuple[str, int]]:
    return [(Path(path).relative_to(pictures.root).as_posix(), n) for path, n in pictures.samples]


def copies(root: Path, *files: str) -> Path:
    """Writes a small picture to each of these files, whatever their extensions."""
    picture(root.parent / "one.png", 7)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root.parent / "one.png", root / file)
    return root


# --- the walk


def test_files_that_are_images_and_files_that_are_skipped(tmp_path: Path, caplog: Caught) -> None:
    images = ["a/1.PNG", "a/2.jfif", "a/4.gif", "a/b/3.avif", "b/5.JPeG", "b/6.tif"]
    hidden = ["a/.ipynb_checkpoints/1.png", ".ipynb_checkpoints/1.png", "a/._1.png"]
    hidden += ["__MACOSX/a/1.png", "a/@eaDir/1.png"]
    others = ["loose.png", "a/7.heic", "b/8.heic", "b/README", "b/Thumbs.db"]
    root = copies(tmp_path / "set", *images, *hidden, *others)
    with caplog.at_level(logging.INFO):
        pictures = class_pictures(root)
    assert files_of(pictures) == [(file, "ab".index(file[0])) for file in images]
    assert pictures.classes == class_folders(root) == ["a", "b"]
    assert [record.message for record in caplog.records] == [
        f"{root}: 6 images, skipped: 1 .db, 2 .heic, 5 hidden, 1 outside of the class folders, "
        f"1 without an extension; the first is {root}/.ipynb_checkpoints"
    ]


def test_a_clean_data_set_logs_nothing(tmp_path: Path, caplog: Caught) -> None:
    with caplog.at_level(logging.INFO):
        assert len(class_pictures(copies(tmp_path / "set", "a/1.png", "b/1.png"))) == 2
    assert not caplog.records


def test_images_of_every_extension_are_read(tmp_path: Path) -> None:
    Image.init()
    assert set(EXTENSIONS) <= {*Image.registered_extensions(), ".avif"}
    for extension in EXTENSIONS:
        path = tmp_path / extension[1:] / f"x{extension}"
        path.parent.mkdir()
        try:
            Image.new("RGB", (16, 16), (200, 200, 200)).save(path)
        except (OSError, ValueError, KeyError):  # this Pillow cannot write the format
            picture(path.parent / "x.png", 200)
    pictures = class_pictures(tmp_path)
    assert len(pictures) == len(EXTENSIONS)
    for i in range(len(pictures)):
        image, label = pictures[i]
        assert image.mode == "RGB" and abs(int(np.asarray(image).mean()) - 200) <= 3 and label == i


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    """The published validation splits depend on it."""
    draw = random.Random(0)
    parts = ["a", "b", "a-b", "A", "a b", "10", "9", "ä"]
    files = {
        "/".join([draw.choice(parts), *draw.sample(parts, draw.randrange(3)), f"{i % 40}.png"])
        for i in range(200)
    }
    root = copies(tmp_path / "set", *files)
    theirs, ours = ImageFolder(root), class_pictures(root)
    assert ours.samples == theirs.samples and ours.classes == theirs.classes
    assert len(ours) == len(files) > 150


def test_links_are_followed_but_never_twice(tmp_path: Path, caplog: Caught) -> None:
    root = copies(tmp_path / "set", "a/1.png", "a/in/2.png", "b/3.png")
    copies(tmp_path / "store", "c/4.png", "more/5.png", "more/deep/6.png")
    (root / "c").symlink_to(tmp_path / "store" / "c")  # a class that lies elsewhere
    links = {
        "0": tmp_path / "store" / "more",  # a part of a class that lies elsewhere
        "9.png": tmp_path / "store" / "more" / "5.png",
        "up": root,
        "self": root / "a",
        "other": root / "b",
        "top": tmp_path,
        "again": root / "a" / "in",
    }
    for name, target in links.items():
        (root / "a" / name).symlink_to(target)
    (tmp_path / "store" / "more" / "back").symlink_to(tmp_path / "store" / "more")
    with caplog.at_level(logging.INFO):
        pictures = class_pictures(root)
    in_a = ["1.png", "9.png", "0/5.png", "0/deep/6.png", "in/2.png"]
    expected = [*((f"a/{file}", 0) for file in in_a), ("b/3.png", 1), ("c/4.png", 2)]
    assert files_of(pictures) == expected
    assert "skipped: 6 linked twice" in caplog.text


def test_one_folder_under_two_classes_is_refused(tmp_path: Path) -> None:
    root = copies(tmp_path / "set", "a/1.png")
    (root / "b").symlink_to("a")
    with pytest.raises(UsageError, match=r"class folders a and b of .* are the same folder"):
        class_pictures(root)


@pytest.mark.parametrize("target", ["gone.png", "2.png"])
def test_a_broken_link_is_named(target: str, tmp_path: Path) -> None:
    """To a missing file, and to itself."""
    root = copies(tmp_path / "set", "a/1.png")
    (root / "a" / "2.png").symlink_to(target)
    with pytest.raises(MissingFileError, match=r"a/2\.png is a broken link"):
        class_pictures(root)


def test_a_pipe_is_skipped(tmp_path: Path, caplog: Caught) -> None:
    root = copies(tmp_path / "set", "a/1.png")
    os.mkfifo(root / "a" / "2.png")
    with caplog.at_level(logging.INFO):
        assert len(class_pictures(root)) == 1
    assert "1 not a regular file" in caplog.text


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    root = copies(tmp_path / "set", "a/1.png", "b/.hidden.png", "c/3.txt")
    with pytest.raises(MissingFileError, match=r"no images of the classes b, c in .*\.avif, \.bmp"):
        class_pictures(root)


@pytest.mark.parametrize("name", ["a", "a/in"])
def test_an_unreadable_folder_is_an_error(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """`os.walk` would skip it."""
    root, scan = copies(tmp_path / "set", "a/in/1.png", "a/2.png"), os.scandir

    def refuse(path: str) -> object:
        if str(path) == str(root / name):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("tangent_arithmetic.data.files.os.scandir", refuse)
    with pytest.raises(UsageError, match=r"cannot be read as a folder .* Permission denied"):
        class_pictures(root)


@pytest.mark.parametrize("name", ["DTD", "GTSRB", "RESISC45"])
def test_hidden_folders_shift_no_labels(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    before = CLIP8_SETS[name](tmp_path)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        copies(folder, ".ipynb_checkpoints/x.png")
        write(folder / "._00000.ppm", b"Mac OS X")
    after = CLIP8_SETS[name](tmp_path)
    for split in ("train", "test"):
        ours, theirs = (getattr(splits, split) for splits in (before, after))
        assert ours.samples == theirs.samples


# --- splits that share images


def copy_list(root: Path) -> str:
    """RESISC45 whose list of test images is that of the training images."""
    folder = root / "resisc45"
    shutil.copy(folder / "resisc45-train.txt", folder / "resisc45-test.txt")
    return r"airplane/airplane_\d+.jpg and .* are the same image"


def copy_mnist(root: Path) -> str:
    for kind in ("images-idx3", "labels-idx1"):
        raw = root / "MNIST" / "raw"
        shutil.copy(raw / f"train-{kind}-ubyte", raw / f"t10k-{kind}-ubyte")
    return r"image 0 of MNIST in .* are the same image in two splits \(of 4\)"


def copy_sign(root: Path) -> str:
    folder, file = root / "gtsrb" / "GTSRB", "00000_00000.ppm"
    shutil.copy(folder / "Training" / "00007" / file, folder / "Final_Test" / "Images" / file)
    with (root / "gtsrb" / "GT-final_test.csv").open("a") as table:
        table.write(f"{file};8;8;1;1;6;6;7\n")
    return f"Training/00007/{file} and .*Images/{file} are the same image"


def link_scenes(root: Path) -> str:
    shutil.rmtree(root / "sun397" / "val")
    (root / "sun397" / "val").symlink_to(root / "sun397" / "train")
    return "are the same image in two splits"


def copied(source: str, target: str) -> Callable[[Path], str]:
    """Writes a unique image to `source`, and copies it to `target`."""

    def copy(root: Path) -> str:
        picture(root / source, 99)
        shutil.copy(root / source, root / target)
        return f"{source} and .*{target} are the same image in two splits"

    return copy


SYNSET = f"{SYNSETS[3]}/kept.JPEG"


@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("RESISC45", copy_list),
        ("Cars", copied("stanford_cars/cars_train/00001.jpg", "stanford_cars/cars_test/00001.jpg")),
        ("GTSRB", copy_sign),
        ("MNIST", copy_mnist),
        ("DTD", copied("dtd/train/woven/kept.jpg", "dtd/val/banded/kept.jpg")),  # another class
        ("EuroSAT", copied("EuroSAT_splits/val/River/1.jpg", "EuroSAT_splits/test/River/1.jpg")),
        ("SUN397", link_scenes),
        ("ImageNet", copied(f"imagenet/train/{SYNSET}", f"imagenet/val_in_folder/{SYNSET}")),
    ],
)
def test_a_data_set_whose_splits_share_images_is_refused(
    name: str, leak: Callable[[Path], str], tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    assert len(load_public(name, CLIP8_SETS[name], tmp_path).train)
    message = leak(tmp_path)
    for load in (
        lambda: CLIP8_SETS[name](tmp_path),
        lambda: load_public(name, CLIP8_SETS[name], tmp_path, "folder"),
    ):
        with pytest.raises(UsageError, match=message):
            len(load().train)  # which lists that of ImageNet


def arrays(*levels: int) -> ArrayPictures:
    images = np.array(levels, np.uint8)[:, None, None, None].repeat(3, 3)
    return ArrayPictures(images, np.zeros(len(levels), np.int64))


@pytest.mark.parametrize(
    ("val", "test", "shared"),
    [
        (arrays(5, 6), arrays(7, 8), False),
        (arrays(5, 7, 8), arrays(7, 8), True),  # validation and test
        (arrays(3, 4, 1), arrays(7, 8), True),  # training and validation
        (None, arrays(4, 5, 6, 7), False),  # a few: CIFAR as published has some
    ],
)
def test_arrays_that_share_most_images_are_refused(
    val: ArrayPictures | None, test: ArrayPictures, shared: bool
) -> None:
    splits = Splits(arrays(1, 2, 3, 4), test, ("a",), val)
    if not shared:
        assert refuse_shared(splits) is splits
        return
    with pytest.raises(UsageError, match="are the same image in two splits"):
        refuse_shared(splits)


def test_one_file_name_for_two_images_is_no_leak(tmp_path: Path) -> None:
    for split, level in {"train": 1, "test": 2}.items():
        picture(tmp_path / split / "a" / "1.png", level)
    train, test = (class_pictures(tmp_path / split) for split in ("train", "test"))
    refuse_shared(Splits(train, test, ("a",)))


# --- lists


@pytest.mark.parametrize(
    ("name", "listing"),
    [
        ("RESISC45", "resisc45/resisc45-test.txt"),
        ("RESISC45", "resisc45/resisc45-train.txt"),
        ("GTSRB", "gtsrb/GT-final_test.csv"),
    ],
)
def test_a_list_in_another_encoding_is_named(
    name: str, listing: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    MAKERS[name](tmp_path, monkeypatch)
    text, path = (tmp_path / listing).read_text(), tmp_path / listing
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(CLIP8_SETS[name](tmp_path).test)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(UsageError, match=f"{listing} cannot be read as a text in UTF-8"):
        CLIP8_SETS[name](tmp_path)


def test_equal_labels_in_two_splits_are_no_leak(tmp_path: Path, monkeypatch: Patch) -> None:
    MAKERS["MNIST"](tmp_path, monkeypatch)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array([5, 0])))
    assert len(CLIP8_SETS["MNIST"](tmp_path).test) == 2
