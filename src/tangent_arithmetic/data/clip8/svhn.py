"""SVHN: cropped digits of house numbers, 32 x 32 pixels.

Source: Netzer et al., "Reading digits in natural images with unsupervised feature learning", 2011.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import read_checked, require_all

CLASSES = tuple("0123456789")
FILES = ("train_32x32.mat", "test_32x32.mat")


def load(location: Path) -> Splits:
    """Reads `svhn/` below `location`."""
    return _read(location / "svhn", "svhn/ with ")


def load_torchvision(location: Path) -> Splits:
    """Reads the two files in `location` itself."""
    return _read(location)


def _read(folder: Path, prefix: str = "") -> Splits:
    require_all(folder, FILES, "SVHN", f"{prefix}{' and '.join(FILES)}")
    from torchvision.datasets import SVHN

    train = read_checked("SVHN", folder, lambda: SVHN(folder, "train"))
    test = read_checked("SVHN", folder, lambda: SVHN(folder, "test"))
    return Splits(train, test, CLASSES)
