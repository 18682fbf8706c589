"""The CLIP suite: the eight tasks of the papers, ImageNet as the control, and three more."""

from __future__ import annotations

from typing import Any

from src.data.base import Loader
from src.data.clip8 import (
    cars,
    cifar10,
    cifar100,
    dtd,
    eurosat,
    gtsrb,
    imagenet,
    mnist,
    resisc45,
    stl10,
    sun397,
    svhn,
)

# A set is a module with `load(location)`, and `CLASSES`, the phrases of its classes in their order.
MODULES: dict[str, Any] = {
    "Cars": cars,
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "DTD": dtd,
    "EuroSAT": eurosat,
    "GTSRB": gtsrb,
    "ImageNet": imagenet,
    "MNIST": mnist,
    "RESISC45": resisc45,
    "STL10": stl10,
    "SUN397": sun397,
    "SVHN": svhn,
}
CLIP8_SETS: dict[str, Loader] = {name: module.load for name, module in MODULES.items()}


def classnames(name: str) -> tuple[str, ...]:
    """The classes of a set, for which no picture is needed; on disk they are the same."""
    module = MODULES[name]
    found: tuple[str, ...] = module.classes() if name == "ImageNet" else module.CLASSES
    return found
