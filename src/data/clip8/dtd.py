"""DTD: 47 describable textures. Its `val` folder holds the test split.

Source: Cimpoi et al., "Describing textures in the wild", CVPR 2014 (arXiv:1311.3618).
"""

from __future__ import annotations

from pathlib import Path

from src.data.base import Splits
from src.data.clip8.folders import ClassFolders, spaced

FOLDERS = ClassFolders(
    "DTD",
    "dtd/{train,val} with one folder of pictures a texture (train: the official train1 and val1; "
    "val: the official test1)",
    47,
    r"[a-z]+([-_][a-z]+)?",
)


def load(location: Path) -> Splits:
    """Reads `dtd/{train,val}` below `location`."""
    train, test = FOLDERS.read(location / "dtd" / "train", location / "dtd" / "val")
    return Splits(train, test, tuple(spaced(name) for name in train.classes))
