"""MNIST: handwritten digits, 28 x 28 greyscale pixels.

Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import read_checked, require_all

CLASSES = tuple("0123456789")
FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
LAYOUT = f"MNIST/raw/ with {', '.join(FILES)}, unpacked (gunzip the .gz files)"


def load(location: Path) -> Splits:
    """Reads `MNIST/raw/` below `location`."""
    folder = location / "MNIST" / "raw"
    require_all(folder, FILES, "MNIST", LAYOUT)
    from torchvision.datasets import MNIST

    train = read_checked("MNIST", folder, lambda: MNIST(location, train=True))
    test = read_checked("MNIST", folder, lambda: MNIST(location, train=False))
    return Splits(train, test, CLASSES)
