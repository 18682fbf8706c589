"""Small files of the true formats: the public data sets at a few pixels a picture.

torchvision compares the published checksums of CIFAR, STL10 and SVHN; the makers put the small
files' own checksums in their place, so that the comparison itself still runs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.clip8 import imagenet
from tangent_arithmetic.data.clip20 import food, tiny_imagenet

Patch = pytest.MonkeyPatch


class Opaque:
    """Pictures that do not say what they are."""

    def __init__(self, pictures: ArrayPictures) -> None:
        self.hidden = pictures

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.hidden[index]


# fmt: off
TEXTURES = [
    "banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked",
    "crosshatched", "crystalline", "dotted", "fibrous", "flecked", "freckled", "frilly", "gauzy",
    "grid", "grooved", "honeycombed", "interlaced", "knitted", "lacelike", "lined", "marbled",
    "matted", "meshed", "paisley", "perforated", "pitted", "pleated", "polka-dotted", "porous",
    "potholed", "scaly", "smeared", "spiralled", "sprinkled", "stained", "stratified", "striped",
    "studded", "swirly", "veined", "waffled", "woven", "wrinkled", "zigzagged",
]
SCENES = [
    "airplane", "airport", "baseball_diamond", "basketball_court", "beach", "bridge", "chaparral",
    "church", "circular_farmland", "cloud", "commercial_area", "dense_residential", "desert",
    "forest", "freeway", "golf_course", "ground_track_field", "harbor", "industrial_area",
    "intersection", "island", "lake", "meadow", "medium_residential", "mobile_home_park",
    "mountain", "overpass", "palace", "parking_lot", "railway", "railway_station",
    "rectangular_farmland", "river", "roundabout", "runway", "sea_ice", "ship", "snowberg",
    "sparse_residential", "stadium", "storage_tank", "tennis_court", "terrace",
    "thermal_power_station", "wetland",
]
LAND = [
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
]
OBJECTS = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]
# fmt: on
SUN_FOLDERS = ["a_abbey", *(f"b_place_{i:03d}" for i in range(395)), "y_youth_hostel"]
SYNSETS = [f"n{1440764 + 7 * i:08d}" for i in range(20)]


# Small files of the true formats


@cache
def picture_bytes(level: int, suffix: str) -> bytes:
    """A picture of 8 x 8 pixels of one grey level, encoded as files of that suffix are."""
    stream = io.BytesIO()
    kind = {".jpg": "JPEG", ".JPEG": "JPEG", ".png": "PNG", ".ppm": "PPM"}[suffix]
    Image.new("RGB", (8, 8), (level, level, level)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes | str) -> None:
    """Writes a file, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def picture(path: Path, level: int) -> None:
    """Writes a picture of one grey level."""
    write(path, picture_bytes(level, path.suffix))


def checksums(folder: Path, files: Iterable[str]) -> list[list[str]]:
    """File names with the files' MD5 sums, as torchvision's lists hold them."""
    return [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file in files]


def make_cars(root: Path, patch: Patch) -> None:
    """The developer kit and the labels are MATLAB structures; classes count from one."""
    folder = root / "stanford_cars"
    names = ["AM General Hummer SUV 2000", *(f"Make {i} Sedan 2012" for i in range(194))]
    names.append("smart fortwo Convertible 2012")
    cells = np.empty((1, 196), dtype=object)
    cells[0, :] = names
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": cells})
    splits = {
        "cars_train": ("devkit/cars_train_annos.mat", (14, 196, 1)),
        "cars_test": ("cars_test_annos_withlabels.mat", (196, 2)),
    }
    for first, (split, (file, classes)) in zip((0, 100), splits.items(), strict=True):
        fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        annotations = np.empty((1, len(classes)), dtype=[(field, object) for field in fields])
        for i, number in enumerate(classes):
            annotations[0, i] = (1, 1, 8, 8, np.uint8(number), f"{i + 1:05d}.jpg")
            picture(folder / split / f"{i + 1:05d}.jpg", first + 10 * i)
        scipy.io.savemat(folder / file, {"annotations": annotations})


def cifar_batch(numbers: Sequence[int], key: str) -> bytes:
    """A pickled batch: picture i is grey of level i and has label i % 10."""
    data = np.repeat(np.array(numbers, dtype=np.uint8)[:, None], 3 * 32 * 32, axis=1)
    return pickle.dumps({"data": data, key: [i % 10 for i in numbers]}, protocol=2)


def make_cifar10(root: Path, patch: Patch) -> None:
    """Five pickled batches to train on, one to test on, one of names."""
    folder = root / "cifar-10-batches-py"
    train = [f"data_batch_{i}" for i in range(1, 6)]
    for i, file in enumerate(train):
        write(folder / file, cifar_batch((2 * i, 2 * i + 1), "labels"))
    write(folder / "test_batch", cifar_batch((21, 23, 25), "labels"))
    write(folder / "batches.meta", pickle.dumps({"label_names": OBJECTS}, protocol=2))
    patch.setattr(datasets.CIFAR10, "train_list", checksums(folder, train))
    patch.setattr(datasets.CIFAR10, "test_list", checksums(folder, ["test_batch"]))
    ((_, md5),) = checksums(folder, ["batches.meta"])
    patch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5})


def make_cifar100(root: Path, patch: Patch) -> None:
    """One pickled batch a split, and the names with underscores."""
    folder = root / "cifar-100-python"
    write(folder / "train", cifar_batch((1, 2, 3, 4), "fine_labels"))
    write(folder / "test", cifar_batch((5, 6), "fine_labels"))
    names = ["apple", "aquarium_fish", *(f"thing_{i}" for i in range(97)), "worm"]
    write(folder / "meta", pickle.dumps({"fine_label_names": names}, protocol=2))
    patch.setattr(datasets.CIFAR100, "train_list", checksums(folder, ["train"]))
    patch.setattr(datasets.CIFAR100, "test_list", checksums(folder, ["test"]))
    ((_, md5),) = checksums(folder, ["meta"])
    patch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": md5})


def make_folders(root: Path, levels: dict[str, int], names: Sequence[str], suffix: str) -> None:
    """For each split, a folder a class with one picture, the first class with one more."""
    for split, level in levels.items():
        for name in names:
            picture(root / split / name / f"{name}_{level}{suffix}", level)
        picture(root / split / names[0] / f"{names[0]}_0{level}{suffix}", level + 1)


def make_dtd(root: Path, patch: Patch) -> None:
    """The test split is in `val`."""
    make_folders(root / "dtd", {"train": 40, "val": 80}, TEXTURES, ".jpg")


def make_eurosat(root: Path, patch: Patch) -> None:
    """Three splits."""
    make_folders(root / "EuroSAT_splits", {"train": 40, "val": 80, "test": 120}, LAND, ".jpg")


def make_sun397(root: Path, patch: Patch) -> None:
    """Folders begin with their first letter; the test split is in `val`."""
    make_folders(root / "sun397", {"train": 40, "val": 80}, SUN_FOLDERS, ".jpg")


def make_imagenet(root: Path, patch: Patch) -> None:
    """Validation pictures in folders, beside the training ones; of 20 classes."""
    patch.setattr(imagenet, "FOLDERS", replace(imagenet.FOLDERS, count=len(SYNSETS)))
    make_folders(root / "imagenet", {"train": 40, "val_in_folder": 80}, SYNSETS, ".JPEG")


def make_gtsrb(root: Path, patch: Patch) -> None:
    """Training pictures in folders of numbers, test pictures with a table."""
    folder = root / "gtsrb"
    for label in range(43):
        sign = folder / "GTSRB" / "Training" / f"{label:05d}"
        picture(sign / "00000_00000.ppm", label)
        write(sign / f"GT-{label:05d}.csv", "Filename;ClassId\n")
    write(folder / "GTSRB" / "Readme-Images.txt", "about")
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i, label in enumerate((16, 1, 42)):
        picture(folder / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm", 100 + label)
        rows.append(f"{i:05d}.ppm;8;8;1;1;6;6;{label}")
    write(folder / "GT-final_test.csv", "\n".join(rows) + "\n")


def idx(array: np.ndarray) -> bytes:
    """An idx file of bytes: two zeros, the type 8, the number of axes, their lengths, the data."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def make_mnist(root: Path, patch: Patch) -> None:
    """Idx files, unpacked, and the archives beside them."""
    for part, labels in {"train": (5, 0, 4, 1), "t10k": (7, 2)}.items():
        levels = np.array(labels)[:, None, None] * np.full((28, 28), 10)
        files = {f"{part}-images-idx3-ubyte": levels, f"{part}-labels-idx1-ubyte": np.array(labels)}
        for file, array in files.items():
            write(root / "MNIST" / "raw" / file, idx(array))
            write(root / "MNIST" / "raw" / f"{file}.gz", gzip.compress(idx(array)))


def make_resisc45(root: Path, patch: Patch) -> None:
    """All pictures in one tree, a list of names for each split."""
    folder = root / "resisc45"
    for split, number in {"train": 1, "val": 2, "test": 3}.items():
        files = [f"{scene}_{number:03d}.jpg" for scene in SCENES]
        if split == "train":
            files.append("airplane_700.jpg")
        for file in files:
            picture(folder / "NWPU-RESISC45" / file[:-8] / file, 20 * number)
        write(folder / f"resisc45-{split}.txt", "\n".join(reversed(files)) + "\n")


def make_stl10(root: Path, patch: Patch) -> None:
    """Raw bytes, one column of pixels after the other; labels count from one."""
    folder = root / "stl10" / "stl10_binary"
    for part, labels in {"train": (1, 10, 3), "test": (2, 8)}.items():
        pixels = np.repeat(np.array(labels, dtype=np.uint8), 3 * 96 * 96)
        write(folder / f"{part}_X.bin", pixels.tobytes())
        write(folder / f"{part}_y.bin", bytes(labels))
    write(folder / "unlabeled_X.bin", bytes(3 * 96 * 96))
    train = ["train_X.bin", "train_y.bin", "unlabeled_X.bin"]
    patch.setattr(datasets.STL10, "train_list", checksums(folder, train))
    patch.setattr(datasets.STL10, "test_list", checksums(folder, ["test_X.bin", "test_y.bin"]))


def make_svhn(root: Path, patch: Patch) -> None:
    """MATLAB arrays; digit zero has label ten."""
    folder = root / "svhn"
    folder.mkdir()
    split_list = {}
    for split, labels in {"train": (1, 9, 10), "test": (5, 10)}.items():
        file, column = f"{split}_32x32.mat", np.array(labels, dtype=np.uint8)[:, None]
        x = np.broadcast_to(column[:, 0], (32, 32, 3, len(labels)))
        scipy.io.savemat(folder / file, {"X": x, "y": column})
        split_list[split] = ["", *checksums(folder, [file])[0]]
    patch.setattr(datasets.SVHN, "split_list", split_list)


# The sets that clip14 and clip20 add


def idx_files(folder: Path, parts: dict[str, tuple[int, ...]], step: int, first: int = 0) -> None:
    """Idx files of 28 x 28 pixels of level (label - first) * step."""
    for part, labels in parts.items():
        levels = (np.array(labels) - first)[:, None, None] * np.full((28, 28), step)
        write(folder / f"{part}-images-idx3-ubyte", idx(levels))
        write(folder / f"{part}-labels-idx1-ubyte", idx(np.array(labels)))


def make_fashion_mnist(root: Path, patch: Patch) -> None:
    """As MNIST, in a folder of its own."""
    parts = {"train": (9, 0, 3), "t10k": (2, 1)}
    idx_files(root / "FashionMNIST" / "FashionMNIST" / "raw", parts, 20)


def make_kmnist(root: Path, patch: Patch) -> None:
    """As MNIST, in a folder of its own."""
    idx_files(root / "KMNIST" / "KMNIST" / "raw", {"train": (1, 8, 8), "t10k": (0, 9)}, 11)


def make_emnist(root: Path, patch: Patch) -> None:
    """The digits of EMNIST."""
    parts = {"emnist-digits-train": (4, 9, 1), "emnist-digits-test": (0, 7)}
    idx_files(root / "EMNIST" / "EMNIST" / "raw", parts, 12)


def make_emnist_letters(root: Path, patch: Patch) -> None:
    """The letters of EMNIST, which count from one."""
    parts = {"emnist-letters-train": (1, 26, 5), "emnist-letters-test": (3, 2)}
    idx_files(root / "EMNIST" / "EMNIST" / "raw", parts, 9, first=1)


def make_fer2013(root: Path, patch: Patch) -> None:
    """One table of training and of two kinds of test pictures, with all pixels as numbers."""
    rows = ["emotion,pixels,Usage"]
    usages = {"Training": (0, 6, 3), "PublicTest": (1,), "PrivateTest": (5, 2)}
    for i, (usage, labels) in enumerate(usages.items()):
        rows += [f"{n},{' '.join([str(n + 40 * i)] * 48 * 48)},{usage}" for n in labels]
    write(root / "fer2013" / "fer2013.csv", "\n".join(rows) + "\n")
    ((_, md5),) = checksums(root / "fer2013", ["fer2013.csv"])
    fer = ("fer2013.csv", md5)
    patch.setattr(datasets.FER2013, "_RESOURCES", {**datasets.FER2013._RESOURCES, "fer": fer})


def make_flowers102(root: Path, patch: Patch) -> None:
    """Numbered pictures, the label of each, and three lists of numbers in no order."""
    folder = root / "flowers102" / "flowers-102"
    numbers = np.arange(1, 307)  # of every class one picture a list
    labels = (7 * numbers) % 102 + 1
    for number, label in zip(numbers, labels, strict=True):
        level = label + 120 * ((number - 1) // 102 == 0)
        picture(folder / "jpg" / f"image_{number:05d}.jpg", int(level))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    names = {"tstid": numbers[:102], "trnid": numbers[204:], "valid": numbers[102:204]}
    lists = {name: part[None, ::-1].astype(np.uint16) for name, part in names.items()}
    scipy.io.savemat(folder / "setid.mat", lists)


def make_food101(root: Path, patch: Patch) -> None:
    """All pictures by dish, and lists of names without endings, by dish in no order."""
    folder = root / "food101" / "food-101"
    dishes = [name.replace(" ", "_") for name in food.CLASSES]
    for split, level in {"train": 50, "test": 150}.items():
        listing = {dish: [f"{dish}/{level}"] for dish in reversed(dishes)}
        for i, dish in enumerate(dishes):
            picture(folder / "images" / dish / f"{level}.jpg", level + i % 40)
        if split == "train":
            listing["waffles"].append("waffles/7")
        write(folder / "meta" / f"{split}.json", json.dumps(listing))
    picture(folder / "images" / "waffles" / "7.jpg", 200)


# fmt: off
PETS = [
    "Abyssinian", "american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle",
    "Bengal", "Birman", "Bombay", "boxer", "British_Shorthair", "chihuahua", "Egyptian_Mau",
    "english_cocker_spaniel", "english_setter", "german_shorthaired", "great_pyrenees", "havanese",
    "japanese_chin", "keeshond", "leonberger", "Maine_Coon", "miniature_pinscher", "newfoundland",
    "Persian", "pomeranian", "pug", "Ragdoll", "Russian_Blue", "saint_bernard", "samoyed",
    "scottish_terrier", "shiba_inu", "Siamese", "Sphynx", "staffordshire_bull_terrier",
    "wheaten_terrier", "yorkshire_terrier",
]
# fmt: on


def make_pets(root: Path, patch: Patch) -> None:
    """All pictures in one folder, and two lists of name, class, species and breed, in no order."""
    folder = root / "OxfordIIITPet" / "oxford-iiit-pet"
    for split, number in {"trainval": 1, "test": 2}.items():
        lines = []
        for label, breed in enumerate(PETS):
            picture(folder / "images" / f"{breed}_{number}.jpg", label + 100 * number)
            lines.append(f"{breed}_{number} {label + 1} {1 + breed[0].islower()} 1\n")
        write(folder / "annotations" / f"{split}.txt", "".join(reversed(lines)))


def make_pcam(root: Path, patch: Patch) -> None:
    """HDF5 files: one array of pictures and one of labels a split."""
    h5py = pytest.importorskip("h5py")
    folder = root / "PCAM" / "pcam"
    folder.mkdir(parents=True)
    for split, levels in {"train": (3, 8, 4), "test": (21, 30)}.items():
        numbers = np.array(levels, np.uint8)[:, None, None, None]
        pixels = np.broadcast_to(numbers, (len(levels), 96, 96, 3))
        for kind, array in {"x": pixels, "y": numbers % 2}.items():
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file.create_dataset(kind, data=array, chunks=(1, *array.shape[1:]))


def make_rendered_sst2(root: Path, patch: Patch) -> None:
    """A folder a class; the validation split is in `valid`."""
    levels = {"train": 40, "valid": 80, "test": 120}
    folder = root / "RenderedSST2" / "rendered-sst2"
    make_folders(folder, levels, ("negative", "positive"), ".png")


def make_tiny_imagenet(root: Path, patch: Patch) -> None:
    """Training pictures below each class, validation pictures in one folder with a table."""
    folder, rows = root / "tiny-imagenet-200", []
    for i, synset in enumerate(tiny_imagenet.NAMES):
        picture(folder / "train" / synset / "images" / f"{synset}_0.JPEG", i % 100)
        write(folder / "train" / synset / f"{synset}_boxes.txt", f"{synset}_0.JPEG\t0\t0\t7\t7\n")
        picture(folder / "val" / "images" / f"val_{i}.JPEG", 100 + i % 100)
        rows.append(f"val_{i}.JPEG\t{synset}\t0\t0\t7\t7\n")
    picture(folder / "train" / "n01443537" / "images" / "n01443537_1.JPEG", 250)
    picture(folder / "test" / "images" / "test_0.JPEG", 251)
    write(folder / "val" / "val_annotations.txt", "".join(reversed(rows)))
    write(folder / "wnids.txt", "\n".join(reversed(tiny_imagenet.NAMES)))


Maker = Callable[[Path, Patch], None]
MAKERS: dict[str, Maker] = {"Cars": make_cars, "CIFAR10": make_cifar10, "CIFAR100": make_cifar100}
MAKERS |= {"DTD": make_dtd, "EuroSAT": make_eurosat, "GTSRB": make_gtsrb, "MNIST": make_mnist}
MAKERS |= {"ImageNet": make_imagenet, "RESISC45": make_resisc45, "STL10": make_stl10}
MAKERS |= {"SUN397": make_sun397, "SVHN": make_svhn}
MAKERS |= {"EMNIST": make_emnist, "EMNISTLetters": make_emnist_letters, "PCAM": make_pcam}
MAKERS |= {"FashionMNIST": make_fashion_mnist, "FER2013": make_fer2013, "KMNIST": make_kmnist}
MAKERS |= {"Flowers102": make_flowers102, "Food101": make_food101, "OxfordIIITPet": make_pets}
MAKERS |= {"RenderedSST2": make_rendered_sst2, "TinyImageNet": make_tiny_imagenet}
