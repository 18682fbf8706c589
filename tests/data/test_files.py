"""Which files are pictures of a set, in which order, and that no picture is in two splits."""

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

from tangent_arithmetic.data.base import ArrayPictures, Pictures, Splits
from tangent_arithmetic.data.clip8 import CLIP8_SETS
from tangent_arithmetic.data.clip8.folders import ClassFolders, LazyPictures
from tangent_arithmetic.data.files import EXTENSIONS, ListedPictures, class_folders, class_pictures
from tangent_arithmetic.data.leaks import refuse_shared
from tangent_arithmetic.data.sources import load_public
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.miniatures import MAKERS, Patch, idx, picture, write

Caught = pytest.LogCaptureFixture


def files_of(pictures: ListedPictures) -> list[tuple[str, int]]:
    return [(Path(path).relative_to(pictures.root).as_posix(), n) for path, n in pictures.samples]


def copies(root: Path, *files: str) -> Path:
    """Small pictures in these files, of whatever ending."""
    picture(root.parent / "one.png", 7)
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root.parent / "one.png", root / file)
    return root


# --- the walk


def test_what_counts_and_what_is_left_out(tmp_path: Path, caplog: Caught) -> None:
    root = copies(
        tmp_path / "set", "a/1.PNG", "a/2.jfif", "a/b/3.avif", "a/4.gif", "b/5.JPeG", "b/6.tif",
        # left out
        "a/.ipynb_checkpoints/1.png", ".ipynb_checkpoints/1.png", "a/._1.png", "b/Thumbs.db",
        "__MACOSX/a/1.png", "a/@eaDir/1.png", "loose.png", "a/7.heic", "b/8.heic", "b/README",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        found = class_pictures(root)
    assert files_of(found) == [
        ("a/1.PNG", 0), ("a/2.jfif", 0), ("a/4.gif", 0), ("a/b/3.avif", 0), ("b/5.JPeG", 1),
        ("b/6.tif", 1),
    ]  # fmt: skip
    assert found.classes == class_folders(root) == ["a", "b"]
    assert [record.message for record in caplog.records] == [
        f"{root}: 6 images, skipped: 1 .db, 2 .heic, 5 hidden, 1 outside of the class folders, "
        f"1 without an extension; the first is {root}/.ipynb_checkpoints"
    ]


def test_a_clean_set_says_nothing(tmp_path: Path, caplog: Caught) -> None:
    with caplog.at_level(logging.INFO):
        assert len(class_pictures(copies(tmp_path / "set", "a/1.png", "b/1.png"))) == 2
    assert not caplog.records


def test_the_endings_are_of_formats_that_pillow_reads() -> None:
    Image.init()
    assert set(EXTENSIONS) <= {*Image.registered_extensions(), ".avif"}


@pytest.mark.parametrize("ending", EXTENSIONS)
def test_each_of_them_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / f"x{ending}"
    path.parent.mkdir()
    try:
        Image.new("RGB", (16, 16), (200, 200, 200)).save(path)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"this Pillow cannot write {ending}")
    image, label = class_pictures(tmp_path)[0]
    assert image.mode == "RGB" and abs(int(np.asarray(image).mean()) - 200) <= 3 and label == 0


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    """On which the published validation splits depend."""
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
    (root / "a" / "0").symlink_to(tmp_path / "store" / "more")  # and a part of one
    (root / "a" / "9.png").symlink_to(tmp_path / "store" / "more" / "5.png")
    for name, target in {"up": root, "self": root / "a", "other": root / "b", "top": tmp_path,
                         "again": root / "a" / "in"}.items():  # fmt: skip
        (root / "a" / name).symlink_to(target)
    (tmp_path / "store" / "more" / "back").symlink_to(tmp_path / "store" / "more")
    with caplog.at_level(logging.INFO):
        found = class_pictures(root)
    assert files_of(found) == [
        ("a/1.png", 0), ("a/9.png", 0), ("a/0/5.png", 0), ("a/0/deep/6.png", 0), ("a/in/2.png", 0),
        ("b/3.png", 1), ("c/4.png", 2),
    ]  # fmt: skip
    assert "skipped: 6 linked twice" in caplog.text


def test_one_folder_under_two_classes_is_refused(tmp_path: Path) -> None:
    root = copies(tmp_path / "set", "a/1.png")
    (root / "b").symlink_to("a")
    with pytest.raises(UsageError, match=r"class folders a and b of .* are the same folder"):
        class_pictures(root)


@pytest.mark.parametrize("target", ["gone.png", "2.png"])
def test_a_link_that_leads_nowhere_is_named(target: str, tmp_path: Path) -> None:
    """To a file that is not there, and to itself."""
    root = copies(tmp_path / "set", "a/1.png")
    (root / "a" / "2.png").symlink_to(target)
    with pytest.raises(MissingFileError, match=r"a/2\.png is a broken link"):
        class_pictures(root)


def test_a_pipe_is_not_waited_for(tmp_path: Path, caplog: Caught) -> None:
    root = copies(tmp_path / "set", "a/1.png")
    os.mkfifo(root / "a" / "2.png")
    with caplog.at_level(logging.INFO):
        assert len(class_pictures(root)) == 1
    assert "1 not a regular file" in caplog.text


def test_a_class_without_a_picture_is_named(tmp_path: Path) -> None:
    root = copies(tmp_path / "set", "a/1.png", "b/.hidden.png", "c/3.txt")
    with pytest.raises(MissingFileError, match=r"no images of the classes b, c in .*\.avif, \.bmp"):
        class_pictures(root)


@pytest.mark.parametrize("name", ["a", "a/in"])
def test_a_folder_that_cannot_be_read_is_an_error(
    name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    """`os.walk` passes it over."""
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


# --- splits


def with_test_list(root: Path, patch: Patch) -> str:
    """RESISC45 whose list of test pictures is that of the training pictures."""
    folder = root / "resisc45"
    shutil.copy(folder / "resisc45-train.txt", folder / "resisc45-test.txt")
    return r"airplane/airplane_\d+.jpg and .* are the same image"


def with_cars(root: Path, patch: Patch) -> str:
    folder = root / "stanford_cars"
    shutil.copy(folder / "cars_train" / "00001.jpg", folder / "cars_test" / "00001.jpg")
    return r"cars_train/00001.jpg and .*cars_test/00001.jpg are the same image"


def with_mnist(root: Path, patch: Patch) -> str:
    folder = root / "MNIST" / "raw"
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(folder / f"train-{kind}-ubyte", folder / f"t10k-{kind}-ubyte")
    return r"image 0 of MNIST in .* are the same image in two splits \(of 4\)"


def with_gtsrb(root: Path, patch: Patch) -> str:
    folder = root / "gtsrb" / "GTSRB"
    source = next((folder / "Training" / "00007").glob("*.ppm"))
    target = folder / "Final_Test" / "Images" / source.name
    shutil.copy(source, target)
    with (root / "gtsrb" / "GT-final_test.csv").open("a") as table:
        table.write(f"{source.name};8;8;1;1;6;6;7\n")
    return f"Training/00007/{source.name} and .*Images/{source.name} are the same image"


def with_imagenet(root: Path, patch: Patch) -> str:
    source = next((root / "imagenet" / "train").rglob("*.JPEG"))
    target = root / "imagenet" / "val_in_folder" / source.parent.name / source.name
    shutil.copy(source, target)
    return f"{source.name} are the same image"


def with_another_class(root: Path, patch: Patch) -> str:
    """A copy in a folder of another class of the test split."""
    source = root / "dtd" / "train" / "woven" / "kept.jpg"
    picture(source, 99)
    shutil.copy(source, root / "dtd" / "val" / "banded" / "kept.jpg")
    return "train/woven/kept.jpg and .*val/banded/kept.jpg are the same image"


def with_sun_lists(root: Path, patch: Patch) -> str:
    shutil.rmtree(root / "sun397" / "val")
    (root / "sun397" / "val").symlink_to(root / "sun397" / "train")
    return "are the same image in two splits"


LEAKS: dict[str, tuple[str, Callable[[Path, Patch], str]]] = {
    "a list of the same pictures": ("RESISC45", with_test_list),
    "a table with numbers": ("Cars", with_cars),
    "a table with names": ("GTSRB", with_gtsrb),
    "arrays": ("MNIST", with_mnist),
    "folders, another class": ("DTD", with_another_class),
    "folders, one link": ("SUN397", with_sun_lists),
    "folders that are listed later": ("ImageNet", with_imagenet),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_set_whose_splits_share_pictures_is_refused(
    kind: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    name, leak = LEAKS[kind]
    MAKERS[name](tmp_path, monkeypatch)
    assert len(load_public(name, CLIP8_SETS[name], tmp_path).train)
    message = leak(tmp_path, monkeypatch)
    for load in (
        lambda: CLIP8_SETS[name](tmp_path),
        lambda: load_public(name, CLIP8_SETS[name], tmp_path, "folder"),
    ):
        with pytest.raises(UsageError, match=message):
            len(load().train)


def arrays(*levels: int) -> ArrayPictures:
    images = np.array(levels, np.uint8)[:, None, None, None].repeat(3, 3)
    return ArrayPictures(images, np.zeros(len(levels), np.int64))


def test_validation_pictures_are_compared_too() -> None:
    train, val, test = arrays(1, 2, 3, 4), arrays(5, 6), arrays(7, 8)
    refuse_shared(Splits(train, test, ("a",), val))
    for splits in (
        Splits(train, test, ("a",), arrays(5, 7, 8)),
        Splits(train, test, ("a",), arrays(3, 4, 1)),
    ):
        with pytest.raises(UsageError, match="are the same image in two splits"):
            refuse_shared(splits)


def test_a_few_shared_pictures_of_an_array_are_as_published() -> None:
    """CIFAR has some, in files that equal the published ones."""
    refuse_shared(Splits(arrays(1, 2, 3, 4), arrays(4, 5, 6, 7), ("a",)))


def test_one_name_for_two_pictures_is_no_leak(tmp_path: Path) -> None:
    for split, level in {"train": 1, "test": 2}.items():
        picture(tmp_path / split / "a" / "1.png", level)
    train, test = (class_pictures(tmp_path / split) for split in ("train", "test"))
    refuse_shared(Splits(train, test, ("a",)))


def test_a_large_set_is_compared_when_it_is_listed(tmp_path: Path) -> None:
    folders = ClassFolders("X", "x/", 1, "a")
    for split in ("train", "test"):
        picture(tmp_path / split / "a" / "1.png", 1)
    test = folders.pictures(tmp_path / "test")
    train: Pictures = LazyPictures(folders, tmp_path / "train", (test,))
    refuse_shared(Splits(train, test, ("a",)))
    with pytest.raises(UsageError, match=r"train/a/1\.png and .*test/a/1\.png are the same image"):
        len(train)


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


@pytest.mark.parametrize("row", ["../00000.ppm;8;8;1;1;6;6;5", "/etc/hosts;8;8;1;1;6;6;5"])
def test_a_table_leads_nowhere_else(row: str, tmp_path: Path, monkeypatch: Patch) -> None:
    MAKERS["GTSRB"](tmp_path, monkeypatch)
    with (tmp_path / "gtsrb" / "GT-final_test.csv").open("a") as table:
        table.write(f"{row}\n")
    with pytest.raises(UsageError, match="which leads out of its folder"):
        CLIP8_SETS["GTSRB"](tmp_path)


def test_a_table_that_names_another_picture_is_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    MAKERS["GTSRB"](tmp_path, monkeypatch)
    table = tmp_path / "gtsrb" / "GT-final_test.csv"
    table.write_text(table.read_text().replace("00001.ppm", "00009.ppm"))
    with pytest.raises(MissingFileError, match=r"1 are missing, the first .*00009\.ppm"):
        CLIP8_SETS["GTSRB"](tmp_path)


def test_mnist_may_hold_other_digits(tmp_path: Path, monkeypatch: Patch) -> None:
    """What is compared is the pictures, not their labels."""
    MAKERS["MNIST"](tmp_path, monkeypatch)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.array([5, 0])))
    assert len(CLIP8_SETS["MNIST"](tmp_path).test) == 2
