"""Stanford Cars: 196 makes, models and years of cars.

Source: Krause et al., "3D object representations for fine-grained categorization", 2013.
"""

from __future__ import annotations

from pathlib import Path

from src.data.base import Splits
from src.data.clip8.folders import read_checked, require_all, spaced

FILES = (
    "devkit/cars_meta.mat",
    "devkit/cars_train_annos.mat",
    "cars_test_annos_withlabels.mat",
    "cars_train/00001.jpg",
    "cars_test/00001.jpg",
)
LAYOUT = (
    "stanford_cars/ with devkit/{cars_meta,cars_train_annos}.mat, cars_test_annos_withlabels.mat "
    "and the pictures directly in cars_train/ and cars_test/"
)


def load(location: Path) -> Splits:
    """Reads `stanford_cars/` below `location`."""
    folder = location / "stanford_cars"
    require_all(folder, FILES, "Cars", LAYOUT)
    from torchvision.datasets import StanfordCars

    train = read_checked("Cars", folder, lambda: StanfordCars(location, "train"))
    test = read_checked("Cars", folder, lambda: StanfordCars(location, "test"))
    return Splits(train, test, tuple(spaced(name) for name in train.classes))
