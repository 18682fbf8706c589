"""CIFAR-10: ten types of objects, 32 x 32 pixels.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import listed, read_checked, require_all, spaced

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CLASSES = listed(
    """
    airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck
    """
)


def load(location: Path) -> Splits:
    """Reads `cifar-10-batches-py/` below `location`."""
    from torchvision.datasets import CIFAR10

    return read_batches("CIFAR10", CIFAR10, location)


def read_batches(name: str, reader: type[CIFAR10], location: Path) -> Splits:
    """Reads the pickled batches of CIFAR-10 or CIFAR-100, whichever `reader` is for."""
    folder = location / reader.base_folder
    files = [file for file, _ in (*reader.train_list, *reader.test_list)]
    files.append(reader.meta["filename"])
    require_all(folder, files, name, f"{reader.base_folder}/ with {', '.join(files)}")
    train = read_checked(name, folder, lambda: reader(location, train=True))
    test = read_checked(name, folder, lambda: reader(location, train=False))
    return Splits(train, test, tuple(spaced(phrase) for phrase in train.classes))
