"""The data sets that the suites clip14 and clip20 add to those of clip8, and the table of all.

The tasks are those of Wang et al., "Localizing task information for improved model merging and
compression", 2024 (arXiv:2405.07813), in the folders of its authors' code. Prompts are in
`data/templates.py`, tasks and training settings in `data/suites.py`.

EMNIST is another task in each public project: here `EMNIST` are the digits of Wang et al., and
`EMNISTLetters` the letters of FusionBench, whose control task is `TinyImageNet`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path

from tangent_arithmetic.data import clip8
from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip20 import (
    fer2013,
    flowers,
    food,
    glyphs,
    pcam,
    pets,
    sst2,
    tiny_imagenet,
)
from tangent_arithmetic.data.hub import HubSet
from tangent_arithmetic.data.sources import Layout, PublicSet

CLASSES: dict[str, tuple[str, ...]] = {
    "EMNIST": glyphs.DIGITS,
    "EMNISTLetters": glyphs.LETTERS,
    "FashionMNIST": glyphs.CLOTHES,
    "FER2013": fer2013.CLASSES,
    "Flowers102": flowers.CLASSES,
    "Food101": food.CLASSES,
    "KMNIST": glyphs.SYLLABLES,
    "OxfordIIITPet": pets.CLASSES,
    "PCAM": pcam.CLASSES,
    "RenderedSST2": sst2.CLASSES,
    "TinyImageNet": tiny_imagenet.CLASSES,
}


def _public(
    load: Callable[[Path], Splits], parent: str, path: str, hub: HubSet | None = None
) -> PublicSet:
    """A set whose layout is torchvision's, which the public projects have in a folder of its own.

    Args:
        load: reads `path`; the argument is the folder that holds it.
        parent: the public projects' folder.
        path: torchvision's folder, in `parent` or in the data root.
        hub: on the Hugging Face hub.
    """
    return PublicSet(
        Layout(partial(_load_below, load, parent), (f"{parent}/{path}",)),
        Layout(load, (path,)),
        hub,
    )


def _load_below(load: Callable[[Path], Splits], parent: str, location: Path) -> Splits:
    return load(location / parent)


# without a source on the hub: EMNIST, since the orientation of its images is not documented there;
# PCAM and FER2013, which have no class names there
CLIP20_SETS: dict[str, PublicSet] = {
    "EMNIST": _public(glyphs.emnist_digits, "EMNIST", "EMNIST/raw"),
    "EMNISTLetters": _public(glyphs.emnist_letters, "EMNIST", "EMNIST/raw"),
    "FashionMNIST": _public(
        glyphs.fashion_mnist,
        "FashionMNIST",
        "FashionMNIST/raw",
        HubSet("zalando-datasets/fashion_mnist", CLASSES["FashionMNIST"]),
    ),
    "FER2013": PublicSet(Layout(fer2013.load, ("fer2013",)), "same"),
    "Flowers102": _public(
        flowers.load,
        "flowers102",
        "flowers-102",
        HubSet(
            "dpdl-benchmark/oxford_flowers102",
            CLASSES["Flowers102"],
            files=clip8.PARQUET,
            aliases=flowers.OTHER_NAMES,
        ),
    ),
    "Food101": _public(
        food.load,
        "food101",
        "food-101",
        HubSet("ethz/food101", CLASSES["Food101"], files=clip8.PARQUET, test="validation"),
    ),
    "KMNIST": _public(
        glyphs.kmnist,
        "KMNIST",
        "KMNIST/raw",
        HubSet("tanganke/kmnist", CLASSES["KMNIST"], aliases=glyphs.KANA),
    ),
    "OxfordIIITPet": _public(
        pets.load,
        "OxfordIIITPet",
        "oxford-iiit-pet",
        HubSet(
            "timm/oxford-iiit-pet", CLASSES["OxfordIIITPet"], files=clip8.PARQUET, label="label"
        ),
    ),
    "PCAM": _public(pcam.load, "PCAM", "pcam"),
    "RenderedSST2": _public(
        sst2.load,
        "RenderedSST2",
        "rendered-sst2",
        HubSet("nateraw/rendered-sst2", CLASSES["RenderedSST2"]),
    ),
    "TinyImageNet": PublicSet(
        Layout(tiny_imagenet.load, ("tiny-imagenet-200",)),
        None,
        HubSet(
            "zh-plus/tiny-imagenet",
            CLASSES["TinyImageNet"],
            test="valid",
            aliases=tiny_imagenet.NAMES | tiny_imagenet.OTHER_SYNSETS,
        ),
    ),
}
PUBLIC_SETS: MutableMapping[str, PublicSet] = ChainMap(clip8.CLIP8_SETS, CLIP20_SETS)


def classnames(name: str) -> tuple[str, ...]:
    """The class names of a public data set, in the order of the labels; needs no files."""
    return CLASSES[name] if name in CLASSES else clip8.classnames(name)
