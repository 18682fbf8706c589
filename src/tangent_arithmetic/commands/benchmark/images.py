"""Synthetic images, as costly to decode as photographs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

NUM_PICTURES = 32
PICTURE_SIZE = (640, 480)
NUM_PHOTOS = 1000
PHOTO_SIZE = (500, 375)  # that of most ImageNet images


def _write(paths: Iterable[Path], size: tuple[int, int]) -> None:
    """Writes images of colour blobs and noise."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for path in paths:
        coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        blobs = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        noisy = blobs.astype(np.int16) + generator.integers(-8, 9, blobs.shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=90)


def write_photos(folder: Path) -> None:
    """JPEG images of the size of photographs, in ten class folders below `photos`."""
    paths = (folder / "photos" / f"class_{i % 10}" / f"{i:05d}.jpg" for i in range(NUM_PHOTOS))
    _write(paths, PHOTO_SIZE)


def write_pictures(folder: Path) -> None:
    """PNG images of the size of photographs, in the layout of EuroSAT below `data`."""
    from tangent_arithmetic.data.clip8.eurosat import PHRASES

    root, classes = folder / "data" / "EuroSAT_splits", sorted(PHRASES)
    counts = {"train": len(classes), "val": len(classes), "test": NUM_PICTURES}
    paths = (
        root / split / classes[i % len(classes)] / f"{i}.png"
        for split, count in counts.items()
        for i in range(count)
    )
    _write(paths, PICTURE_SIZE)
