"""RenderedSST2: sentences of movie reviews rendered as images, negative or positive.

Source: Radford et al., 2021 (arXiv:2103.00020), appendix A; sentences of Socher et al., "Recursive
deep models for semantic compositionality over a sentiment treebank", EMNLP 2013.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import ClassFolders

CLASSES = ("negative", "positive")
FOLDERS = ClassFolders(
    "RenderedSST2",
    "[RenderedSST2/]rendered-sst2/{train,test} with one folder of images per class, negative "
    "and positive",
    len(CLASSES),
    "|".join(CLASSES),
)


def load(location: Path) -> Splits:
    """Reads `rendered-sst2/{train,test}` below `location`.

    The published split `valid` is not used: as in the public projects, validation images are held
    out from the training images.
    """
    root = location / "rendered-sst2"
    train, test = FOLDERS.read(root / "train", root / "test")
    return Splits(train, test, CLASSES)
