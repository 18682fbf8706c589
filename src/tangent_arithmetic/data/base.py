"""The types that all data sets share."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tangent_arithmetic.data.files import samples_of
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown


class Pictures(Protocol):
    """A map-style data set of untransformed images, or texts: `pictures[i] == (image, label)`.

    The label is an integer, or the uint8 array of a multi-label data set, see `Splits`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Splits:
    """The splits of one data set.

    Attributes:
        train: training images.
        test: test images.
        classnames: one phrase per class, in the order of the labels, as the prompts use them.
        val: validation images; None if the data set has none, then a part of `train` is held out.
        source: where they were read from, such as folder, torchvision, hub, table or embedded.
        multilabel: whether an image has several labels: `pictures[i]` is then an image and a uint8
            array of shape (classes,) of zeros and ones.
        copies: gives the first training image of the same content for each that repeats an earlier
            one, by index; of data sets of one's own alone: published ones are split as published.
    """

    train: Pictures
    test: Pictures
    classnames: tuple[str, ...]
    val: Pictures | None = None
    source: str = "folder"
    multilabel: bool = False
    copies: Callable[[], Mapping[int, int]] = dict


WAY_OUT = " Put it there or name another root with --data-location; --suite=embedded needs no data."
Loader = Callable[[Path], Splits]  # from the data root (--data-location) to the splits


@dataclass(frozen=True)
class ArrayPictures:
    """Images in memory.

    Attributes:
        images: uint8 array of shape (n, height, width, 3).
        labels: int64 array of shape (n,), or uint8 of shape (n, classes) for several an image.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        label = self.labels[index]
        return Image.fromarray(self.images[index]), label if np.ndim(label) else int(label)


@dataclass(frozen=True)
class SubsetPictures:
    """A subset of another data set, by index."""

    pictures: Pictures
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.pictures[int(self.indices[index])]


def spaced(name: str) -> str:
    """A folder's name, or a label, as a phrase: underscores become spaces."""
    return " ".join(name.replace("_", " ").split()) or name


def distinct(name: str, classes: Sequence[object], phrases: Sequence[str]) -> tuple[str, ...]:
    """Returns the class names, if a prompt can tell them all apart.

    Args:
        name: the data set, for the message.
        classes: the classes as the data name them.
        phrases: the class names, in the same order.

    Raises:
        UsageError: if two are the same.
    """
    alike: dict[str, list[object]] = defaultdict(list)
    for each, phrase in zip(classes, phrases, strict=True):
        alike[unicodedata.normalize("NFC", " ".join(phrase.split()))].append(each)
    for phrase, several in alike.items():
        if len(several) > 1:
            raise UsageError(
                f"data set {name}: the classes {', '.join(shown(repr(c)) for c in several[:5])} "
                f"have the same name '{shown(phrase)}', so that no prompt can tell them apart. "
                "Merge them, or give each its own name: in classnames.txt in its folder, or "
                f"{name}=SOURCE?classnames=FILE"
            )
    return tuple(phrases)


def require(path: Path, name: str, layout: str) -> Path:
    """Returns `path` if it exists.

    Args:
        path: file or folder that data set `name` needs.
        name: the data set, for the message.
        layout: description of the expected files below the data root.

    Raises:
        MissingFileError: if it does not exist.
    """
    if path.exists():
        return path
    raise MissingFileError(
        f"data set {name} is not complete: {path} does not exist. Expected below "
        f"--data-location: {layout}.{WAY_OUT}"
    )


def name_of(pictures: Pictures, index: int) -> str:
    """A name by which a user can find an image: its file, or its index and the type of data set."""
    while isinstance(pictures, SubsetPictures):
        index, pictures = int(pictures.indices[index]), pictures.pictures
    if (joined := getattr(pictures, "name_of", None)) is not None:
        return str(joined(index))
    if (samples := samples_of(pictures)) is not None:
        return str(samples[index][0])
    root = getattr(pictures, "root", None)
    where = f" in {root}" if root is not None else ""
    return f"image {index} of {type(pictures).__name__}{where}"
