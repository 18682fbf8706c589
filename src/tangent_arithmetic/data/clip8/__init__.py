"""The data sets of suite clip8: the papers' eight tasks, ImageNet as the control, and three more.

Prompts are in `data/templates.py`, tasks and training settings in `data/suites.py`. To add a data
set of your own, use `data.suites.register_dataset`.
"""

from __future__ import annotations

from functools import partial

from tangent_arithmetic.data.clip8 import (
    arrays,
    cars,
    dtd,
    eurosat,
    gtsrb,
    imagenet,
    resisc45,
    sun397,
)
from tangent_arithmetic.data.hub import HubSet
from tangent_arithmetic.data.sources import Layout, PublicSet

PARQUET = "data/{}-*"  # excludes the corrupted copies of test splits in some repositories

CLIP8_SETS: dict[str, PublicSet] = {
    "Cars": PublicSet(
        Layout(cars.load, ("stanford_cars",)),
        "same",
        HubSet("tanganke/stanford_cars", cars.CLASSES, files=PARQUET),
    ),
    "CIFAR10": PublicSet(
        Layout(arrays.cifar10, ("cifar-10-batches-py",)),
        "same",
        HubSet("uoft-cs/cifar10", arrays.CIFAR10_CLASSES),
    ),
    "CIFAR100": PublicSet(
        Layout(arrays.cifar100, ("cifar-100-python",)),
        "same",
        HubSet(
            "uoft-cs/cifar100", arrays.CIFAR100_CLASSES, label="fine_label", aliases={"cra": "crab"}
        ),
    ),
    "DTD": PublicSet(
        Layout(dtd.load, ("dtd/train", "dtd/val")),
        Layout(dtd.load_torchvision, ("dtd/dtd",)),
        HubSet("tanganke/dtd", dtd.CLASSES, files=PARQUET),
    ),
    "EuroSAT": PublicSet(
        Layout(eurosat.load, ("EuroSAT_splits",)),
        Layout(eurosat.load_torchvision, ()),
        HubSet("tanganke/eurosat", eurosat.CLASSES, files=PARQUET, aliases=eurosat.PHRASES),
    ),
    "GTSRB": PublicSet(
        Layout(gtsrb.load, ("gtsrb",)),
        "same",
        HubSet("tanganke/gtsrb", gtsrb.CLASSES, files=PARQUET),
    ),
    "ImageNet": PublicSet(
        Layout(imagenet.load, ("imagenet",)),
        Layout(partial(imagenet.load, folder=""), ("meta.bin",)),
    ),
    "MNIST": PublicSet(
        Layout(arrays.mnist, ("MNIST/raw",)), "same", HubSet("ylecun/mnist", arrays.DIGITS)
    ),
    "RESISC45": PublicSet(
        Layout(resisc45.load, ("resisc45",)),
        None,
        HubSet("tanganke/resisc45", resisc45.CLASSES, files=PARQUET),
    ),
    "STL10": PublicSet(
        Layout(arrays.stl10, ("stl10",)),
        Layout(partial(arrays.stl10, folder=""), ("stl10_binary",)),
        HubSet("tanganke/stl10", arrays.STL10_CLASSES, files=PARQUET),
    ),
    "SUN397": PublicSet(
        Layout(sun397.load, ("sun397/train", "sun397/val")),
        Layout(sun397.load_torchvision, ("SUN397/ClassName.txt",)),
        HubSet("tanganke/sun397", sun397.CLASSES, files=PARQUET),
    ),
    "SVHN": PublicSet(
        Layout(arrays.svhn, ("svhn",)),
        Layout(partial(arrays.svhn, folder=""), arrays.SVHN_FILES),
        HubSet("ufldl-stanford/svhn", arrays.DIGITS, "cropped_digits", files="cropped_digits/{}-*"),
    ),
}


def classnames(name: str) -> tuple[str, ...]:
    """The class names of a data set, in the order of the labels; needs no files."""
    hub = CLIP8_SETS[name].hub
    return imagenet.classes() if hub is None else hub.classnames
