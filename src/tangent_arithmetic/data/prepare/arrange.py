"""Arranges the published archives of each public data set as its loader expects them.

All functions can be run again after an interruption: files are written atomically, and existing
ones are kept.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tangent_arithmetic.data.clip8.eurosat import PHRASES as LAND
from tangent_arithmetic.data.prepare.facts import Archive
from tangent_arithmetic.data.prepare.fetch import Place
from tangent_arithmetic.data.prepare.unpack import gunzip, reading, refused, tar, unpack
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.matlab import read_table
from tangent_arithmetic.storage.reading import inside, read_text, readable

CARS_TABLES = ("meta", "train_annos")  # tables of the developer kit that the loader reads
EUROSAT_HELD_OUT = 270  # images of every class for val, and as many for test
EUROSAT_SEED = 0
EMNIST_PARTS = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
SYNSET = re.compile(r"n\d{8}")


def gunzipped(place: Place) -> None:
    """Unpacks files that are packed one by one: those of MNIST and its kin, and of PCAM."""
    for archive in place.public.archives:
        packed = place.archive(archive.name)
        name = archive.name.removeprefix(f"{place.name}-").removesuffix(".gz")
        gunzip(packed, place.folder / name)


def emnist(place: Place) -> None:
    """Unpacks the four idx files of the digits, or of the letters, from the archive of all."""
    split = "letters" if place.name == "EMNISTLetters" else "digits"
    files = [f"emnist-{split}-{part}-ubyte" for part in EMNIST_PARTS]
    packed = {f"gzip/{file}.gz" for file in files}
    with unpacked(place, "gzip.zip", wanted=packed.__contains__) as source:
        for file in files:
            gunzip(part(place, source, f"gzip/{file}.gz"), place.folder / file)


def published(place: Place) -> None:
    """Takes the published files as they are."""
    _take_published(place, place.public.archives)


def stl10(place: Place) -> None:
    """Unpacks the binary files to `stl10/stl10_binary/`."""
    _extract(place, "stl10_binary.tar.gz", "stl10_binary", place.folder / "stl10_binary")


def one_folder(place: Place) -> None:
    """Unpacks an archive of one folder, named as the data set's folder."""
    _extract(place, place.public.archives[0].name, place.folder.name, place.folder)


def flowers(place: Place) -> None:
    """Unpacks the images, and takes the two tables."""
    _extract(place, "102flowers.tgz", "jpg", place.folder / "jpg")
    _take_published(place, place.public.archives[1:])


def pets(place: Place) -> None:
    """Unpacks the images and the lists, without the outlines of the animals."""
    with unpacked(place, "images.tar.gz", wanted=lambda name: name.endswith(".jpg")) as source:
        take_all(tree(part(place, source, "images"), place.folder / "images"))
    lists = [f"annotations/{name}.txt" for name in ("trainval", "test")]
    with unpacked(place, "annotations.tar.gz", wanted=set(lists).__contains__) as source:
        take_all((part(place, source, name), place.folder / name) for name in lists)


def gtsrb(place: Place) -> None:
    """Unpacks the training images, the test images and the test labels, each from an archive."""
    for split, name, inner in (
        ("train", "GTSRB-Training_fixed.zip", "GTSRB/Training"),
        ("test", "GTSRB_Final_Test_Images.zip", "GTSRB/Final_Test/Images"),
    ):
        if not holds(place.folder / inner, "*.ppm", place.public.splits[split].total):
            _extract(place, name, inner, place.folder / inner)
    labels = place.folder / "GT-final_test.csv"
    if not labels.exists():
        _extract(place, "GTSRB_Final_Test_GT.zip", labels.name, labels)


def dtd(place: Place) -> None:
    """Arranges the official partition 1: train1 and val1 in `dtd/train`, test1 in `dtd/val`."""
    folders = (place.downloads / "dtd", place.folder / "dtd", place.folder)
    with unpacked(place, "dtd-r1.0.1.tar.gz", *folders, needs="labels/test1.txt") as source:
        base = source if (source / "labels").exists() else part(place, source, "dtd")
        for split, lists in {"train": ("train1", "val1"), "val": ("test1",)}.items():
            names = [n for one in lists for n in listed(part(place, base, f"labels/{one}.txt"))]
            take_all((base / "images" / n, place.folder / split / n) for n in names)


def eurosat(place: Place) -> None:
    """Arranges a random split with 270 val and 270 test images per class.

    The public projects' split is random and unpublished; ours has the same sizes per class. Lists
    `eurosat-{train,val,test}.txt`, one file name per line, take precedence.

    Raises:
        UsageError: if there are splits of other sizes, since they may be the original ones.
    """
    unfinished = place.folder / ".unfinished"  # marks splits as our own
    if not unfinished.exists() and any(place.folder.rglob("*.jpg")):
        raise UsageError(
            f"data set EuroSAT: the images in {place.folder} are not split as expected; nothing "
            "was changed. Complete the splits, or move the folder away and run again."
        )
    folders = (place.downloads / "2750", place.root / "eurosat" / "2750")
    with unpacked(place, "EuroSAT.zip", *folders, needs="Forest") as source:
        base = source if (source / "Forest").exists() else part(place, source, "2750")
        splits = _listed_eurosat(place) or _random_eurosat(base)
        place.folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        for split, names in splits.items():
            take_all((base / name, place.folder / split / name) for name in names)
        unfinished.unlink()


def _listed_eurosat(place: Place) -> dict[str, list[PurePosixPath]]:
    """The images of each split in the user's lists; their names begin with the class."""
    lists = {split: place.find(f"eurosat-{split}.txt") for split in place.public.splits}
    return {
        split: [inside(path, f"{n.name.rpartition('_')[0]}/{n.name}") for n in listed(path)]
        for split, path in lists.items()
        if path is not None and all(lists.values())
    }


def _random_eurosat(base: Path) -> dict[str, list[PurePosixPath]]:
    splits: dict[str, list[PurePosixPath]] = {"val": [], "test": [], "train": []}
    for folder in sorted(LAND):
        names = [PurePosixPath(folder, path.name) for path in (base / folder).glob("*.jpg")]
        names.sort()
        random.Random(f"{EUROSAT_SEED} {folder}").shuffle(names)
        splits["val"] += names[:EUROSAT_HELD_OUT]
        splits["test"] += names[EUROSAT_HELD_OUT : 2 * EUROSAT_HELD_OUT]
        splits["train"] += names[2 * EUROSAT_HELD_OUT :]
    return splits


def resisc45(place: Place) -> None:
    """Unpacks all images, and takes the published lists."""
    target = place.folder / "NWPU-RESISC45"
    if not holds(target, "*.jpg", sum(figure.total for figure in place.public.splits.values())):
        folder, rar = place.downloads / target.name, place.find("NWPU-RESISC45.rar")
        if rar and not folder.exists() and not place.find("NWPU-RESISC45.zip"):
            unpack(rar, place.downloads)  # raises an error that names programs for it
        with unpacked(place, "NWPU-RESISC45.zip", folder, needs="airplane") as source:
            base = source if source == folder else part(place, source, target.name)
            take_all(tree(base, target))
    _take_published(place, place.public.lists)


def sun397(place: Place) -> None:
    """Arranges the first official partition, renaming folders such as `a/abbey` to `a_abbey`."""
    folders = (place.downloads / "Partitions", place.downloads / "SUN397")
    with unpacked(place, "Partitions.zip", *folders, needs="Testing_01.txt") as lists:
        parts = {"train": "Training_01.txt", "val": "Testing_01.txt"}
        lines = {split: listed(_search(lists, name, place)) for split, name in parts.items()}
    wanted = {f"SUN397/{line}" for names in lines.values() for line in names}
    folder = place.downloads / "SUN397"
    with unpacked(place, "SUN397.tar.gz", folder, needs="a", wanted=wanted.__contains__) as source:
        base = source if source == folder else part(place, source, "SUN397")
        for split, names in lines.items():
            take_all(
                (base / line, place.folder / split / "_".join(line.parts[:-1]) / line.name)
                for line in names
            )


def cars(place: Place) -> None:
    """Unpacks the archives of the former official page, or Kaggle's archive of the images."""
    if not all((place.folder / "devkit" / f"cars_{n}.mat").exists() for n in CARS_TABLES):
        _extract(place, "car_devkit.tgz", "devkit", place.folder / "devkit")
    labels = "cars_test_annos_withlabels.mat"
    if not (place.folder / labels).exists():
        renamed = place.find("cars_test_annos_withlabels (1).mat")  # Kaggle's file name
        take_all([(renamed or place.archive(labels), place.folder / labels)])
    for split, figure in place.public.splits.items():
        target = place.folder / f"cars_{split}"
        if not holds(target, "*.jpg", figure.total):
            official, kaggle = f"cars_{split}.tgz", "stanford-cars-dataset.zip"
            use_kaggle = place.find(kaggle) and not place.find(official)
            with unpacked(place, kaggle if use_kaggle else official) as source:
                pictures = [p for p in source.rglob("*.jpg") if p.parent.name == target.name]
                take_all((picture, target / picture.name) for picture in pictures)


def imagenet(place: Place) -> None:
    """Unpacks the official archives to one folder per synset."""
    train, val = place.folder / "train", place.folder / "val"
    if not holds(train, "*.JPEG", place.public.splits["train"].total):
        _imagenet_train(place, train)
    total = place.public.splits["test"].total
    if not any(holds(place.folder / f, "n*/*.JPEG", total) for f in ("val_in_folder", "val")):
        synsets, target = _validation_synsets(place), place.folder / "val_in_folder"
        with unpacked(place, "ILSVRC2012_img_val.tar", val, needs=next(iter(synsets))) as source:
            images = sorted(source.rglob("ILSVRC2012_val_*.JPEG"))
            if unknown := [path.name for path in images if path.name not in synsets]:
                raise UsageError(
                    f"{shown(unknown[0])} is not one of the {len(synsets):,} validation images of "
                    "ImageNet; use the published archive"
                )
            take_all((path, target / synsets[path.name] / path.name) for path in images)


def _imagenet_train(place: Place, target: Path) -> None:
    """Unpacks an archive that holds one archive per synset; existing synsets are skipped."""
    archive = place.archive("ILSVRC2012_img_train.tar")
    with reading(archive):
        for name, _, content in progress(tar(archive), "synsets", place.public.classes):
            synset = name.removesuffix(".tar")
            if not SYNSET.fullmatch(synset):
                raise refused(archive, name, "is not the archive of a synset")
            if not (target / synset).exists():
                with staging(place) as folder:
                    unpack(archive, folder, stream=content)
                    target.mkdir(parents=True, exist_ok=True)
                    folder.replace(target / synset)


def _validation_synsets(place: Place) -> dict[str, str]:
    """The synset of each validation image, by file name."""
    with unpacked(place, "ILSVRC2012_devkit_t12.tar.gz") as source:
        path = _search(source, "meta.mat", place)
        table = read_table(path, "synsets", ("ILSVRC2012_ID", "WNID"))
        with readable(path, "the developer kit's table of synsets"):
            synsets = {int(number): synset for number, synset in table}
        truth = _search(source, "ILSVRC2012_validation_ground_truth.txt", place)
        with readable(truth, "one synset number per line"):
            lines = enumerate(read_text(truth).split(), 1)
            folders = {f"ILSVRC2012_val_{i:08d}.JPEG": synsets[int(line)] for i, line in lines}
    for synset in folders.values():
        if not SYNSET.fullmatch(synset):
            raise UsageError(f"{path} names {shown(synset)!r}, expected synsets such as n01440764")
    return folders


ARRANGERS: dict[str, Callable[[Place], None]] = {
    "Cars": cars,
    "CIFAR10": one_folder,
    "CIFAR100": one_folder,
    "DTD": dtd,
    "EMNIST": emnist,
    "EMNISTLetters": emnist,
    "EuroSAT": eurosat,
    "FashionMNIST": gunzipped,
    "FER2013": published,
    "Flowers102": flowers,
    "Food101": one_folder,
    "GTSRB": gtsrb,
    "ImageNet": imagenet,
    "KMNIST": gunzipped,
    "MNIST": gunzipped,
    "OxfordIIITPet": pets,
    "PCAM": gunzipped,
    "RenderedSST2": one_folder,
    "RESISC45": resisc45,
    "STL10": stl10,
    "SUN397": sun397,
    "SVHN": published,
    "TinyImageNet": one_folder,
}


def holds(folder: Path, pattern: str, total: int) -> bool:
    """Whether a folder holds `total` files that match a pattern, at any depth."""
    return folder.exists() and sum(1 for _ in folder.rglob(pattern)) == total


@contextmanager
def staging(place: Place) -> Iterator[Path]:
    """A temporary folder below the data root; replaces that of an interrupted run."""
    folder = place.root / f".preparing-{place.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unpacked(
    place: Place,
    name: str,
    *folders: Path,
    needs: str = "",
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[Path]:
    """A folder with the content of an archive, unpacked here or already by the user.

    Args:
        place: the data set.
        name: of the archive.
        folders: where the user may have unpacked it, if there is no archive.
        needs: a path that such a folder must contain.
        wanted: selects the files to unpack.
    """
    existing = [folder for folder in folders if (folder / needs).exists()]
    if existing and place.find(name) is None:
        yield existing[0]
        return
    archive = place.archive(name)
    with staging(place) as folder:
        unpack(archive, folder, wanted)
        yield folder


def part(place: Place, folder: Path, name: str) -> Path:
    """A file or folder that an unpacked archive must contain."""
    if (folder / name).exists():
        return folder / name
    raise MissingFileError(
        f"data set {place.name}: expected {name} in the archive or its folder, got "
        f"{', '.join(sorted(path.name for path in folder.iterdir())[:5]) or 'nothing'}. The "
        f"published version is at {place.public.page}."
    )


def _search(folder: Path, name: str, place: Place) -> Path:
    """The file of this name, at any depth below a folder."""
    return next(folder.rglob(name), None) or part(place, folder, name)


def _extract(place: Place, archive: str, name: str, target: Path) -> None:
    """Takes one file or folder of an archive."""
    with unpacked(place, archive) as source:
        take_all(tree(part(place, source, name), target))


def _take_published(place: Place, files: Iterable[Archive]) -> None:
    """Takes published files as they are."""
    take_all((place.archive(file.name), place.folder / file.name) for file in files)


def listed(path: Path) -> list[PurePosixPath]:
    """The relative paths in a list, one per line.

    Raises:
        UsageError: if a path leads out of its folder, or the list is not a text.
    """
    return [inside(path, line.removeprefix("/")) for line in read_text(path).splitlines() if line]


def tree(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """All files of a folder, each with its path below `target`; also for a single file."""
    paths = [source, *source.rglob("*")]
    return [(path, target / path.relative_to(source)) for path in paths if path.is_file()]


def take_all(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Links or copies sources to targets, atomically; targets of the right size are kept.

    Raises:
        MissingFileError: if a source file does not exist.
    """
    for source, target in progress(pairs, "arranging"):
        if not source.exists():
            raise MissingFileError(
                f"{source.name} is listed, but {source} does not exist: the archive or folder is "
                "incomplete; download it again"
            )
        if not target.exists() or target.stat().st_size != source.stat().st_size:
            _take(source, target)


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(target)
