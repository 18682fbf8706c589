"""Transforms of a batch are those of its images, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.batched import parts_of
from tangent_arithmetic.data.loading import EvalBatches, SeededPictures, restored, seed_transforms

NORMALIZE = transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
KEYS = [(2, 5), (0, 1), (2, 3), (7, 5)]


class Mixed:
    """Images of several sizes or modes."""

    def __init__(self, *kinds: tuple[str, tuple[int, int]]) -> None:
        self.kinds = kinds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        mode, size = self.kinds[index % len(self.kinds)]
        shape = (*size[::-1], *((len(mode),) if mode != "L" else ()))
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        return Image.fromarray(pixels), index % 3


class Jittered(transforms.ToTensor):
    """A user's own step of the same name as a known one's base."""

    def __call__(self, picture: Any) -> torch.Tensor:
        found: torch.Tensor = super().__call__(picture) + torch.rand(())
        return found


TRANSFORMS: dict[str, tuple[Callable[..., Any], bool | None]] = {  # and whether it draws
    "CLIP's": (image_transform(24, is_train=False), False),
    "CLIP's for training": (image_transform(24, is_train=True), True),
    "plain": (transforms.Compose([transforms.ToTensor(), NORMALIZE]), False),
    "flips": (
        transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]),
        True,
    ),
    "without Normalize": (transforms.Compose([transforms.ToTensor()]), None),
    "own tensor": (transforms.Compose([Jittered(), NORMALIZE]), None),
    "a function": (transforms.ToTensor(), None),
}
PICTURES: dict[str, Any] = {
    "one size": Mixed(("RGB", (24, 24))),
    "sizes": Mixed(("RGB", (24, 24)), ("RGB", (40, 31)), ("RGB", (30, 50))),
    "modes": Mixed(("RGB", (24, 24)), ("L", (24, 24)), ("RGBA", (24, 24))),
}


CASES = [(n, k) for n in TRANSFORMS for k in PICTURES if k != "modes" or n.startswith("CLIP")]


def test_grey_images_reach_every_transform_in_colour() -> None:
    grey = Mixed(("L", (40, 31)))
    for name, (transform, _) in TRANSFORMS.items():
        for key in KEYS if "own" not in name else ():
            x, _ = SeededPictures(grey, transform, seed=3)[key]
            assert x.shape[0] == 3
            if name.startswith("CLIP"):  # which converts by itself, after the resize
                with restored():
                    seed_transforms((3, *key))
                    assert torch.equal(x, transform(grey[key[1]][0]))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_batch_is_its_images(name: str, kind: str) -> None:
    transform, draws = TRANSFORMS[name]
    parts = parts_of(transform)
    assert (None if parts is None else parts.draws) is draws
    pictures = SeededPictures(PICTURES[kind], transform, seed=3)
    torch.manual_seed(0)
    random.seed(0)
    expected = [pictures[key] for key in KEYS]
    states = torch.get_rng_state(), random.getstate()
    found = pictures.__getitems__(KEYS)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert len(found) == len(KEYS)
    for (x, label), (y, wanted) in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y) and label == wanted


def test_evaluation_batches_are_its_images() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    pictures, transform = ArrayPictures(images, np.arange(10) % 3), TRANSFORMS["CLIP's"][0]
    batches = list(EvalBatches(pictures, transform, batch_size=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    expected = torch.stack([transform(pictures[i][0]) for i in range(10)])
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)
