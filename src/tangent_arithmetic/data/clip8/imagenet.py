"""ImageNet-1k, the control set: a thousand classes, the validation images as the test split.

Source: Russakovsky et al., "ImageNet large scale visual recognition challenge", IJCV 2015
(arXiv:1409.0575).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import ClassFolders
from tangent_arithmetic.data.files import LazyPictures, ListedPictures
from tangent_arithmetic.data.leaks import refuse_pair

FOLDERS = ClassFolders(
    "ImageNet",
    "imagenet/train and imagenet/val_in_folder (or imagenet/val), each with one folder of "
    "images per synset, for instance n01440764",
    1000,
    r"n\d{8}",
)


def classes() -> tuple[str, ...]:
    """OpenAI's class names, from open_clip."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def load(location: Path, folder: str = "imagenet") -> Splits:
    """Reads `train` and `val_in_folder`, or else `val`, in `folder` below `location`.

    Labels are positions among the sorted synsets, so all thousand folders must exist. The training
    images, 1.3 million files, are listed only when first used.
    """
    root = location / folder
    sorted_val = root / "val_in_folder"
    val = sorted_val if sorted_val.exists() else root / "val"
    FOLDERS.check_same((root / "train", val))
    test = FOLDERS.pictures(val)
    return Splits(LazyPictures(partial(_train, root / "train", test)), test, classes())


def _train(path: Path, test: ListedPictures) -> ListedPictures:
    train = FOLDERS.pictures(path)
    refuse_pair(train, test)
    return train
