"""The CLIP suite: the eight tasks of the papers, ImageNet as the control, and three more."""

from __future__ import annotations

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

CLIP8_SETS: dict[str, Loader] = {
    "Cars": cars.load,
    "CIFAR10": cifar10.load,
    "CIFAR100": cifar100.load,
    "DTD": dtd.load,
    "EuroSAT": eurosat.load,
    "GTSRB": gtsrb.load,
    "ImageNet": imagenet.load,
    "MNIST": mnist.load,
    "RESISC45": resisc45.load,
    "STL10": stl10.load,
    "SUN397": sun397.load,
    "SVHN": svhn.load,
}
