"""What every data set is, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from tangent_arithmetic.runtime.errors import MissingFileError


class Pictures(Protocol):
    """A map-style data set of untransformed pictures: `pictures[i] == (image, label)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Splits:
    """The pictures of one data set.

    Attributes:
        train: pictures to train on.
        test: pictures to report on.
        classnames: one phrase a class, in the order of the labels, as the prompts use them.
        val: held-out pictures where the data set has them; otherwise the registry holds out a part
            of `train`.
        source: where they were found: folder, torchvision, hub or embedded.
    """

    train: Pictures
    test: Pictures
    classnames: tuple[str, ...]
    val: Pictures | None = None
    source: str = "folder"


WAY_OUT = " Put it there or name another root with --data-location; --suite=embedded needs no data."
Loader = Callable[[Path], Splits]  # from the data root (--data-location) to the splits


@dataclass(frozen=True)
class ArrayPictures:
    """Pictures in memory.

    Attributes:
        images: uint8 array of shape (n, height, width, 3).
        labels: int64 array of shape (n,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class SubsetPictures:
    """Some pictures of another data set, by index."""

    pictures: Pictures
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[int(self.indices[index])]


def require(path: Path, name: str, layout: str) -> Path:
    """Returns `path` if it exists.

    Args:
        path: file or folder that data set `name` needs.
        name: the data set, for the message.
        layout: what is expected below the data root, in words.

    Raises:
        MissingFileError: if it does not exist.
    """
    if path.exists():
        return path
    raise MissingFileError(
        f"data set {name} is not complete: {path} does not exist. Expected below "
        f"--data-location: {layout}.{WAY_OUT}"
    )


def name_of(pictures: Any, index: int) -> str:
    """What a user finds a picture by: its file, or the data set's kind and its index there."""
    while isinstance(pictures, SubsetPictures):
        pictures, index = pictures.pictures, int(pictures.indices[index])
    samples = getattr(getattr(pictures, "listing", pictures), "samples", None)  # of class folders
    if samples is not None:
        return str(samples[index][0])
    root = getattr(pictures, "root", None)
    where = f" in {root}" if root is not None else ""
    return f"picture {index} of {type(pictures).__name__}{where}"
