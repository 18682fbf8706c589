"""Image transforms of backbones, with the recipe by which features are cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.encoders.base import Transform

IMAGENET: dict[str, Any] = {
    "size": (224, 224),
    "resize": 256,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
}
SCALE = (0.9, 1.0)  # of a training crop's area, as for CLIP; digits and letters are not flipped


def with_recipe(transform: Any, recipe: Any) -> Transform:
    """The transform with a JSON value as its `recipe`, see `arithmetic/features.py`."""
    transform.recipe = recipe
    out: Transform = transform
    return out


def training(
    size: Sequence[int], mean: Sequence[float], std: Sequence[float], interpolation: str
) -> Transform:
    """Random crops of nearly the whole image, resized and normalised.

    Args:
        size: height and width of the crop in pixels.
        mean: by channel, of values in [0, 1].
        std: by channel.
        interpolation: as torchvision spells it, such as "bicubic".
    """
    from torchvision import transforms as t

    mode = t.InterpolationMode(interpolation)
    crop = t.RandomResizedCrop(tuple(size), scale=SCALE, interpolation=mode)
    facts = {"size": list(size), "mean": list(mean), "std": list(std), "scale": list(SCALE)}
    return with_recipe(
        t.Compose([crop, t.ToTensor(), t.Normalize(list(mean), list(std))]),
        {"backbone": {**facts, "interpolation": interpolation}, "training": True},
    )


def evaluation(
    size: Sequence[int],
    resize: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> Transform:
    """The centre of the image, whose shorter side is resized to `resize`; normalised."""
    from torchvision import transforms as t

    mode = t.InterpolationMode(interpolation)
    parts = [t.Resize(resize, interpolation=mode), t.CenterCrop(tuple(size)), t.ToTensor()]
    facts = {"size": list(size), "resize": resize, "mean": list(mean), "std": list(std)}
    return with_recipe(
        t.Compose([*parts, t.Normalize(list(mean), list(std))]),
        {"backbone": {**facts, "interpolation": interpolation}, "training": False},
    )


def imagenet() -> tuple[Transform, Transform]:
    """The usual transforms of ImageNet: for training, and for evaluation."""
    facts = {name: value for name, value in IMAGENET.items() if name != "resize"}
    return training(**facts), evaluation(**IMAGENET)
