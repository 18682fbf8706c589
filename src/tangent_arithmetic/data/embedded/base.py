"""Definition of an embedded data set: class names, prompt templates and three fixed splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from tangent_arithmetic.data.embedded.drawing import SIZE, Rng

Split = Literal["train", "val", "test"]
Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 (n, 32, 32, 3), labels int64 (n,)

ASSETS = Path(__file__).parent / "assets"
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class EmbeddedSet:
    """One data set of the embedded suite.

    Attributes:
        name: as flags spell it, for instance "Textures".
        classnames: one phrase per class; the label is the index.
        templates: prompts with one `{}` for the class name.
        build: returns the arrays of a split.
        source: origin and licence of the images.
        version: increased when the images change, which invalidates cached ones.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    build: Callable[[Split], Arrays]
    source: str
    version: int = 1

    @cached_property
    def prompts(self) -> list[Callable[[str], str]]:
        """The templates as functions of the class name, as in open_clip."""
        return [template.format for template in self.templates]


def render_split(
    render: Callable[[Rng, int], np.ndarray], num_classes: int, seed: int, sizes: dict[Split, int]
) -> Callable[[Split], Arrays]:
    """The `build` function of a synthetic set.

    Image i of a split is drawn with a generator seeded with (seed, split, i), and classes
    alternate, so that any image can be drawn alone and every split is balanced.

    Args:
        render: draws one image of a class, uint8 (32, 32, 3).
        num_classes: number of classes.
        seed: unique to the data set.
        sizes: number of images per split.
    """

    def build(split: Split) -> Arrays:
        count, part = sizes[split], SPLITS.index(split)
        images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
        labels = np.arange(count) % num_classes
        for i, label in enumerate(labels):
            images[i] = render(np.random.default_rng((seed, part, i)), int(label))
        return images, labels

    return build


SYNTHETIC_SIZES: dict[Split, int] = {"train": 4000, "val": 500, "test": 1000}
