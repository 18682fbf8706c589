"""A small encoder with batch normalisation, and a split of 24 images in three batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torchvision.transforms import Compose, ToTensor

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.encoders.base import ModuleEncoder

IMAGES, CLASSES, FEATURES = 24, 5, 6


def declared(recipe: Any, *steps: Any) -> Compose:
    """A transform with a recipe."""
    transform = Compose(steps)
    transform.recipe = recipe
    return transform


class Convolution(ModuleEncoder):
    """Images (batch, 3, 6, 6) to features."""

    kind = "convolution"

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())
        self.after = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, FEATURES))
        self.val_preprocess = declared("pixels", ToTensor())

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.after(self.before(images))
        return out


def pictures(images: int = IMAGES) -> ArrayPictures:
    """Random images with labels."""
    random = np.random.default_rng(0).integers(0, 256, (images, 6, 6, 3), np.uint8)
    return ArrayPictures(random, np.arange(images) % CLASSES)


def multilabel_pictures(classes: int = CLASSES, flipped: bool = False) -> ArrayPictures:
    """Random images with none, one or several labels each."""
    rng = np.random.default_rng(2)
    labels = (rng.random((IMAGES, classes)) < 0.4).astype(np.uint8)
    labels[0], labels[1] = 0, 1
    return ArrayPictures(pictures().images, 1 - labels if flipped else labels)
