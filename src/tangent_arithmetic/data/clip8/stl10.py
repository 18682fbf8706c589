"""STL-10: ten types of objects, 96 x 96 pixels; the labelled images.

Source: Coates et al., "An analysis of single-layer networks in unsupervised feature learning",
AISTATS 2011.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import read_checked, require_all

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def load(location: Path) -> Splits:
    """Reads `stl10/stl10_binary/` below `location`.

    torchvision verifies the checksums of all files, including the unlabelled images'.
    """
    return _read(location / "stl10", "stl10/")


def load_torchvision(location: Path) -> Splits:
    """Reads `stl10_binary/` below `location`."""
    return _read(location)


def _read(root: Path, prefix: str = "") -> Splits:
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    files = [file for file, _ in (*STL10.train_list, *STL10.test_list)]
    require_all(folder, files, "STL10", f"{prefix}{STL10.base_folder}/ with {', '.join(files)}")
    train = read_checked("STL10", folder, lambda: STL10(root, "train"))
    test = read_checked("STL10", folder, lambda: STL10(root, "test"))
    return Splits(train, test, CLASSES)
