"""What an embedded data set is: class names, prompt templates and three fixed splits of arrays."""

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
        name: as users type it, for instance "Textures".
        classnames: one phrase a class; the label is the index.
        templates: prompts with one `{}` for the class name.
        build: makes the arrays of a split.
        source: where the pictures come from and under which licence.
        version: raised when the pictures change, so that rendered caches are not mixed.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    build: Callable[[Split], Arrays]
    source: str
    version: int = 1

    @cached_property
    def prompts(self) -> list[Callable[[str], str]]:
        """The templates as functions of the class name, as open_clip spells them."""
        return [template.format for template in self.templates]


def render_split(
    render: Callable[[Rng, int], np.ndarray],
    num_classes: int,
    seed: int,
    sizes: dict[Split, int],
) -> Callable[[Split], Arrays]:
    """The `build` function of a synthetic set.

    Picture i of a split is drawn by a generator seeded with (seed, split, i), and classes take
    turns, so that any picture can be drawn alone and every split is balanced.

    Args:
        render: draws one picture of a class, uint8 (32, 32, 3).
        num_classes: number of classes.
        seed: the data set's own number; two sets must not share it.
        sizes: number of pictures a split.
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
PHOTO_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.", "an image of the {}.")
