"""DTD: 47 describable textures. Its `val` folder holds the test split.

Source: Cimpoi et al., "Describing textures in the wild", CVPR 2014 (arXiv:1311.3618).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import ClassFolders, listed, spaced

CLASSES = listed(
    """
    banded, blotchy, braided, bubbly, bumpy, chequered, cobwebbed, cracked, crosshatched,
    crystalline, dotted, fibrous, flecked, freckled, frilly, gauzy, grid, grooved, honeycombed,
    interlaced, knitted, lacelike, lined, marbled, matted, meshed, paisley, perforated, pitted,
    pleated, polka-dotted, porous, potholed, scaly, smeared, spiralled, sprinkled, stained,
    stratified, striped, studded, swirly, veined, waffled, woven, wrinkled, zigzagged
    """
)
FOLDERS = ClassFolders(
    "DTD",
    "dtd/{train,val} with one folder of images per texture (train: the official train1 and val1; "
    "val: the official test1)",
    47,
    r"[a-z]+([-_][a-z]+)?",
)


TORCHVISION = replace(
    FOLDERS,
    layout="dtd/dtd/ with images/<texture>/*.jpg and labels/{train1,val1,test1}.txt, as "
    "torchvision.datasets.DTD(root, download=True) leaves them",
)


def load(location: Path) -> Splits:
    """Reads `dtd/{train,val}` below `location`."""
    train, test = FOLDERS.read(location / "dtd" / "train", location / "dtd" / "val")
    return Splits(train, test, tuple(spaced(name) for name in train.classes))


def load_torchvision(location: Path) -> Splits:
    """Reads `dtd/dtd` below `location`: partition 1, its train and val lists to train on."""
    root = location / "dtd" / "dtd"
    lists = {name: root / "labels" / f"{name}1.txt" for name in ("train", "val", "test")}
    train, test = TORCHVISION.read_lists(
        root / "images", (lists["train"], lists["val"]), (lists["test"],)
    )
    return Splits(train, test, tuple(spaced(name) for name in train.classes))
