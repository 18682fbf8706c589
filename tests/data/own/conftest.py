"""Small data sets in files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Fill = Callable[[Path, Mapping[str, int]], Path]

NUMBERS = itertools.count(1)


def picture(path: Path) -> Path:
    """Writes an image of 8 x 8 pixels that is unlike all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(next(NUMBERS)).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def fill() -> Fill:
    """Writes class folders, given the number of images of each class, and gives their root."""

    def write(root: Path, counts: Mapping[str, int]) -> Path:
        for name, count in counts.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(root / name / f"{name[:2]}{i:03}.png")
        return root

    return write
