"""PCAM: patches of lymph node sections, with or without metastatic tissue, 96 x 96 pixels.

Source: Veeling et al., "Rotation equivariant CNNs for digital pathology", MICCAI 2018
(arXiv:1806.03962).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import read_checked, require_all
from tangent_arithmetic.runtime.errors import PictureError, UsageError, shown

CLASSES = ("lymph node", "lymph node containing metastatic tumor tissue")
SIZE = 96  # pixels


def file_name(split: str, kind: str) -> str:
    """The name of a published file: `kind` is x for the images, y for the labels."""
    return f"camelyonpatch_level_2_split_{split}_{kind}.h5"


FILES = tuple(file_name(split, kind) for split in ("train", "test") for kind in ("x", "y"))


@dataclass(frozen=True, eq=False)
class StoredPictures:
    """Images in an HDF5 file, read one at a time: the training images are 7 GB.

    Attributes:
        files: the file of the images and that of the labels.
        targets: the labels, int64 of shape (n,).
    """

    files: tuple[Path, Path]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            with _h5py().File(self.files[0]) as file:  # for each: processes cannot share one
                pixels = file["x"][index]
        except (OSError, KeyError, RuntimeError) as error:
            raise PictureError(
                f"image {index} of {self.files[0]} cannot be read ({shown(error)}); the file is "
                "damaged, fetch it again"
            ) from error
        return Image.fromarray(pixels), int(self.targets[index])


def load(location: Path) -> Splits:
    """Reads `pcam/` below `location`, which needs the package h5py.

    The published validation images are not used: as in the public projects, validation images are
    held out from the training images.

    Raises:
        MissingFileError: if a file is missing.
        UsageError: if one is damaged, or h5py is not installed.
    """
    folder = location / "pcam"
    require_all("PCAM", folder, FILES, f"[PCAM/]pcam/ with {', '.join(FILES)}, unpacked")
    _h5py()
    train, test = (
        read_checked("PCAM", folder, partial(_stored, folder, split)) for split in ("train", "test")
    )
    return Splits(train, test, CLASSES)


def _stored(folder: Path, split: str) -> StoredPictures:
    """Reads the labels, and the shape of the images.

    Raises:
        ValueError: if shapes or types are not as published.
    """
    images, labels = (folder / file_name(split, kind) for kind in ("x", "y"))
    with _h5py().File(images) as x, _h5py().File(labels) as y:
        shape, targets = x["x"].shape, y["y"][:]
        if shape[1:] != (SIZE, SIZE, 3) or x["x"].dtype != np.uint8:
            raise ValueError(f"{images.name} has images of shape {shape[1:]}, type {x['x'].dtype}")
    if targets.shape != (shape[0], 1, 1, 1):
        raise ValueError(f"{labels.name} has shape {targets.shape} for {shape[0]} images")
    return StoredPictures((images, labels), targets.reshape(-1).astype(np.int64))


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UsageError(
            'data set PCAM needs the package h5py, which is not installed: pip install -e ".[pcam]"'
        ) from error
    return h5py
