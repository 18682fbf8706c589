"""FER2013: seven facial expressions, 48 x 48 greyscale pixels.

Source: Goodfellow et al., "Challenges in representation learning: a report on three machine
learning contests", 2013 (arXiv:1307.0414).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tangent_arithmetic.data.base import ArrayPictures, Splits, require
from tangent_arithmetic.data.clip8.folders import listed, read_checked

if TYPE_CHECKING:
    from torchvision.datasets import FER2013

# In the order of the labels. OpenAI's prompts for CLIP have several words for some; the first here.
CLASSES = listed("angry, disgusted, fearful, happy, sad, surprised, neutral")
FILES = ("fer2013.csv", "icml_face_data.csv")  # the same data; the first wins
LAYOUT = (
    "fer2013/ with fer2013.csv or icml_face_data.csv (train.csv and test.csv have no labels of the "
    "test images)"
)


def load(location: Path) -> Splits:
    """Reads `fer2013/` below `location`; both published test parts are the test split.

    torchvision verifies the file's checksum.
    """
    from torchvision.datasets import FER2013

    folder = location / "fer2013"
    if not any((folder / file).exists() for file in FILES):
        require(folder / FILES[0], "FER2013", LAYOUT)
    train, test = (
        _arrays(read_checked("FER2013", folder, partial(FER2013, location, split)))
        for split in ("train", "test")
    )
    return Splits(train, test, CLASSES)


def _arrays(pictures: FER2013) -> ArrayPictures:
    """The images in one array, as RGB; torchvision holds a list of pairs."""
    grey = np.stack([image.numpy() for image, _ in pictures._samples])
    labels = np.array([label for _, label in pictures._samples], np.int64)
    return ArrayPictures(np.repeat(grey[..., None], 3, axis=-1), labels)
