"""FashionMNIST, KMNIST and EMNIST: 28 x 28 greyscale pixels in the format of MNIST.

Sources:
    FashionMNIST: Xiao et al., 2017 (arXiv:1708.07747).
    KMNIST: Clanuwat et al., "Deep learning for classical Japanese literature", 2018
        (arXiv:1812.01718).
    EMNIST: Cohen et al., "EMNIST: extending MNIST to handwritten letters", 2017 (arXiv:1702.05373).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.arrays import DIGITS
from tangent_arithmetic.data.clip8.folders import listed, read_checked, require_all

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

# the names of torchvision, but letters as FusionBench writes them
CLOTHES = listed(
    "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
)
SYLLABLES = listed("o, ki, su, tsu, na, ha, ma, ya, re, wo")
KANA = dict(zip("おきすつなはまやれを", SYLLABLES, strict=True))
LETTERS = tuple(ascii_uppercase)
KINDS = ("images-idx3", "labels-idx1")


def fashion_mnist(location: Path) -> Splits:
    """Ten types of clothes, in `FashionMNIST/raw/`."""
    from torchvision.datasets import FashionMNIST

    read = partial(FashionMNIST, location)
    return _read("FashionMNIST", location / "FashionMNIST" / "raw", CLOTHES, read)


def kmnist(location: Path) -> Splits:
    """Ten characters of cursive Japanese, in `KMNIST/raw/`."""
    from torchvision.datasets import KMNIST

    return _read("KMNIST", location / "KMNIST" / "raw", SYLLABLES, partial(KMNIST, location))


def emnist_digits(location: Path) -> Splits:
    """Handwritten digits, in `EMNIST/raw/`; see `emnist_letters` for their orientation."""
    return _emnist("EMNIST", location, "digits", DIGITS)


def emnist_letters(location: Path) -> Splits:
    """Handwritten letters, upper and lower case in one class, in `EMNIST/raw/`.

    The files hold rows and columns exchanged; the images are upright. Labels count from one in the
    files, and from zero here.
    """
    return _emnist("EMNISTLetters", location, "letters", LETTERS)


def _emnist(name: str, location: Path, split: str, classnames: tuple[str, ...]) -> Splits:
    from torchvision.datasets import EMNIST

    def read(train: bool) -> MNIST:
        pictures = EMNIST(location, split, train=train)
        pictures.data = pictures.data.transpose(1, 2).contiguous()
        pictures.targets -= int(split == "letters")
        return pictures

    parts = tuple(f"emnist-{split}-{part}" for part in ("train", "test"))
    return _read(name, location / "EMNIST" / "raw", classnames, read, parts)


def _read(
    name: str,
    folder: Path,
    classnames: tuple[str, ...],
    read: Callable[[bool], MNIST],
    parts: tuple[str, ...] = ("train", "t10k"),
) -> Splits:
    """Reads the training and the test images, `read(True)` and `read(False)`.

    Args:
        name: the data set.
        folder: of its files.
        classnames: one phrase per class.
        read: a torchvision reader.
        parts: how the names of the training and of the test files begin.
    """
    files = [f"{part}-{kind}-ubyte" for part in parts for kind in KINDS]
    parent = folder.parent.name
    layout = f"[{parent}/]{parent}/raw/ with {', '.join(files)}, unpacked (gunzip the .gz files)"
    require_all(name, folder, files, layout)
    train, test = (read_checked(name, folder, partial(read, train)) for train in (True, False))
    return Splits(train, test, classnames)
