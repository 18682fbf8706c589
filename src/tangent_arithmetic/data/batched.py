"""Transforms of several images at once, with the numbers of one at a time.

CLIP's preprocessing ends in ToTensor and Normalize, which act on each number alone, so images of a
batch share them; what comes before is done image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from torchvision import transforms

Transform = Callable[[Any], Any]
TO_TENSOR = ("torchvision.ToTensor", "open_clip.MaybeToTensor")
NORMALIZE = ("torchvision.Normalize",)
FIXED = (  # steps that draw no random numbers
    "torchvision.Resize",
    "torchvision.CenterCrop",
    "open_clip.MaybeConvertMode",
    "open_clip._convert_to_rgb",
)


@dataclass(frozen=True)
class Parts:
    """A transform in two parts.

    Attributes:
        head: maps an image to an image.
        draws: whether the head may draw random numbers.
        tail: ToTensor and Normalize.
    """

    head: Transform
    draws: bool
    tail: transforms.Compose

    def together(self, images: Sequence[Any]) -> Sequence[Tensor]:
        """The tensors of images that the head has made."""
        if not all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images):
            return [self.tail(image) for image in images]
        if len({image.size for image in images}) != 1:
            return [self.tail(image) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        numbers = pixels.permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div(255)
        return list(self.tail.transforms[1](numbers))


def parts_of(transform: Any) -> Parts | None:
    """A transform that ends in ToTensor and Normalize, in parts; None for another."""
    from torchvision import transforms  # seconds, and merging reads no images

    if type(transform) is not transforms.Compose or len(transform.transforms) < 2:
        return None
    *head, first, last = transform.transforms
    if _name(first) not in TO_TENSOR or _name(last) not in NORMALIZE:
        return None
    draws = any(_name(step) not in FIXED for step in head)
    return Parts(transforms.Compose(head), draws, transforms.Compose([first, last]))


def _name(step: object) -> str:
    """The package and the type of a step, or its name if it is a function."""
    kind = step if hasattr(step, "__name__") else type(step)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
