"""CIFAR-100: a hundred kinds of objects, 32 x 32 pixels; the fine labels.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

from pathlib import Path

from src.data.base import Splits
from src.data.clip8.cifar10 import read_batches


def load(location: Path) -> Splits:
    """Reads `cifar-100-python/` below `location`."""
    from torchvision.datasets import CIFAR100

    return read_batches("CIFAR100", CIFAR100, location)
