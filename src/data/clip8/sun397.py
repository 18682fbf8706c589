"""SUN397: 397 kinds of scenes. Its `val` folder holds the test split.

Source: Xiao et al., "SUN database: large-scale scene recognition from abbey to zoo", CVPR 2010.
"""

from __future__ import annotations

from pathlib import Path

from src.data.base import Splits
from src.data.clip8.folders import ClassFolders, spaced

FOLDERS = ClassFolders(
    "SUN397",
    "sun397/{train,val} with one folder of pictures a scene, for instance a_abbey or "
    "a_apartment_building_outdoor (the first official partition)",
    397,
    r"[a-z]_\w+",
)


def load(location: Path) -> Splits:
    """Reads `sun397/{train,val}` below `location`."""
    train, test = FOLDERS.read(location / "sun397" / "train", location / "sun397" / "val")
    return Splits(train, test, tuple(spaced(name[2:]) for name in train.classes))
