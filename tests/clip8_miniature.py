"""A miniature of the nine data sets of `clip8`, in the folders of the public projects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io

from tangent_arithmetic.data.suites import get_suite
from tests.miniatures import MAKERS, checksums, idx, picture, write

COUNT = 20  # training pictures of a set in one file, enough to hold some out


def enlarge_cars(root: Path) -> None:
    """More training pictures; the developer kit and the test split are left."""
    folder = root / "stanford_cars"
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    rows = np.empty((1, COUNT), dtype=[(field, object) for field in fields])
    for i in range(COUNT):
        rows[0, i] = (1, 1, 8, 8, np.uint8(i + 1), f"{i + 1:05d}.jpg")
        picture(folder / "cars_train" / f"{i + 1:05d}.jpg", 10 * i)
    scipy.io.savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": rows})


def enlarge_mnist(root: Path) -> None:
    """More training pictures."""
    labels = np.arange(COUNT) % 10
    levels = 5 + labels[:, None, None] * np.full((28, 28), 10)  # none of the test split's
    for kind, array in (("images-idx3", levels), ("labels-idx1", labels)):
        write(root / "MNIST" / "raw" / f"train-{kind}-ubyte", idx(array))


def enlarge_svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    """More training pictures."""
    from torchvision.datasets import SVHN

    labels = (np.arange(COUNT, dtype=np.uint8) % 10 + 1)[:, None]
    x = np.broadcast_to(100 + labels[:, 0], (32, 32, 3, COUNT))  # none of the test split's
    file = "train_32x32.mat"
    scipy.io.savemat(root / "svhn" / file, {"X": x, "y": labels})
    train = ["", *checksums(root / "svhn", [file])[0]]
    patch.setattr(SVHN, "split_list", {**SVHN.split_list, "train": train})


def make_miniature(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Writes all sets of the suite, each with a validation split."""
    suite = get_suite("clip8")
    assert suite.control is not None
    for name in (*suite.tasks, suite.control):
        MAKERS[name](root, patch)
    enlarge_cars(root)
    enlarge_mnist(root)
    enlarge_svhn(root, patch)
