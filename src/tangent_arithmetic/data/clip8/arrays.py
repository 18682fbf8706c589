"""MNIST, SVHN, CIFAR-10, CIFAR-100 and STL-10: small images that torchvision reads into memory.

Sources:
    MNIST: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    SVHN: Netzer et al., "Reading digits in natural images with unsupervised feature learning",
        2011.
    CIFAR: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    STL-10: Coates et al., "An analysis of single-layer networks in unsupervised feature learning",
        AISTATS 2011.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tangent_arithmetic.data.base import Pictures, Splits
from tangent_arithmetic.data.clip8.folders import listed, read_checked, require_all

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

DIGITS = tuple("0123456789")
CIFAR10_CLASSES = listed("airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck")
CIFAR100_CLASSES = listed(
    """
    apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge,
    bus, butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud,
    cockroach, couch, crab, crocodile, cup, dinosaur, dolphin, elephant, flatfish, forest, fox,
    girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster, man,
    maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree,
    pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray,
    road, rocket, rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel,
    streetcar, sunflower, sweet pepper, table, tank, telephone, television, tiger, tractor, train,
    trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm
    """
)
STL10_CLASSES = listed("airplane, bird, car, cat, deer, dog, horse, monkey, ship, truck")
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")


def mnist(location: Path) -> Splits:
    """Handwritten digits, 28 x 28 greyscale pixels, in `MNIST/raw/`."""
    from torchvision.datasets import MNIST

    kinds = ("images-idx3", "labels-idx1")
    files = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in kinds]
    layout = f"MNIST/raw/ with {', '.join(files)}, unpacked (gunzip the .gz files)"
    folder = location / "MNIST" / "raw"
    require_all("MNIST", folder, files, layout)
    return _read("MNIST", folder, DIGITS, lambda split: MNIST(location, split == "train"))


def svhn(location: Path, folder: str = "svhn") -> Splits:
    """Cropped digits of house numbers, 32 x 32 pixels, in `folder`."""
    from torchvision.datasets import SVHN

    root = location / folder
    prefix = f"{folder}/ with " if folder else ""
    require_all("SVHN", root, SVHN_FILES, f"{prefix}{' and '.join(SVHN_FILES)}")
    return _read("SVHN", root, DIGITS, lambda split: SVHN(root, split))


def stl10(location: Path, folder: str = "stl10") -> Splits:
    """The labelled images of ten types of objects, 96 x 96 pixels, in `folder/stl10_binary/`.

    torchvision verifies the checksums of all files, including the unlabelled images'.
    """
    from torchvision.datasets import STL10

    path = Path(folder, STL10.base_folder)
    files = [file for file, _ in (*STL10.train_list, *STL10.test_list)]
    require_all("STL10", location / path, files, f"{path}/ with {', '.join(files)}")
    root = location / folder
    return _read("STL10", location / path, STL10_CLASSES, lambda split: STL10(root, split))


def cifar10(location: Path) -> Splits:
    """Ten types of objects, 32 x 32 pixels, in `cifar-10-batches-py/`."""
    from torchvision.datasets import CIFAR10

    return _cifar("CIFAR10", CIFAR10, location, CIFAR10_CLASSES)


def cifar100(location: Path) -> Splits:
    """A hundred types of objects, 32 x 32 pixels, with the fine labels, in `cifar-100-python/`."""
    from torchvision.datasets import CIFAR100

    return _cifar("CIFAR100", CIFAR100, location, CIFAR100_CLASSES)


def _cifar(name: str, reader: type[CIFAR10], location: Path, classnames: tuple[str, ...]) -> Splits:
    folder = location / reader.base_folder
    files = [file for file, _ in (*reader.train_list, *reader.test_list)]
    files.append(reader.meta["filename"])
    require_all(name, folder, files, f"{reader.base_folder}/ with {', '.join(files)}")
    return _read(name, folder, classnames, lambda split: reader(location, split == "train"))


def _read(
    name: str, folder: Path, classnames: tuple[str, ...], read: Callable[[str], Pictures]
) -> Splits:
    train, test = (read_checked(name, folder, partial(read, split)) for split in ("train", "test"))
    return Splits(train, test, classnames)
