"""Small classifiers whose encoders train adapters, or masked weights; standard and linear."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.training.lora import adapted
from tangent_arithmetic.training.talos import Masks, restricted

KINDS = [(linear, how) for linear in (False, True) for how in ("lora", "talos")]


class Attending(ModuleEncoder):
    """A layer of a transformer in small: a convolution, a norm, attention, a linear layer."""

    kind = "attending_encoder"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(self.patches(inputs).flatten(2).mT)
        features: Tensor = self.out((x + self.attn(x, x, x, need_weights=False)[0]).mean(1))
        return features


def some_masks(encoder: nn.Module, share: float = 0.3) -> Masks:
    """Random masks; not of the bias of keys, whose gradient is zero up to rounding."""
    rng = np.random.default_rng(3)
    masks = {
        name: torch.from_numpy(rng.random(p.shape) < share)
        for name, p in encoder.named_parameters()
    }
    masks["attn.in_proj_bias"][8:16] = False
    return masks


def encoder(linear: bool, how: str, base: ModuleEncoder | None = None) -> ModuleEncoder:
    """An encoder that trains adapters of rank 2 ("lora"), or some weights ("talos")."""
    base = base or Attending()
    masks = some_masks(base)
    start = linearized(base) if linear else base
    return adapted(start, 2, "all", seed=1) if how == "lora" else restricted(start, masks)


def classifier(linear: bool, how: str) -> ImageClassifier:
    """Its classifier, with a frozen head."""
    made = encoder(linear, how)
    torch.manual_seed(1)
    model = ImageClassifier(made, ClassificationHead(True, torch.randn(3, 4)))
    model.freeze_head()
    return model


def move(model: nn.Module, size: float = 0.3) -> None:
    """Moves what is trained, away from the start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
