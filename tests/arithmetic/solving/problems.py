"""Random splits along directions, in which some directions help, and their logits in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.reduced import Reduced

IMAGES, CLASSES, WIDTH, DIRECTIONS = 60, 4, 7, 3


def raw(seed: int, images: int = IMAGES, width: int = WIDTH, directions: int = DIRECTIONS
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """W, features (1 + directions, images, width), and labels, which W f and W d_1 tell a bit."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, width, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    features = torch.randn(1 + directions, images, width, generator=generator)
    features[0] += 0.3 * weight[labels]
    features[1] += 0.6 * weight[labels]
    return 3 * weight, features, labels


def reduced(
    seed: int = 0, normalises: bool = True, bias: Tensor | None = None, **sizes: int
) -> Reduced:
    """The same as a `Reduced`, without the code under test."""
    weight, features, labels = raw(seed, **sizes)
    base, *steps = features @ weight.T
    root = features.permute(1, 2, 0).contiguous() if normalises else None
    return Reduced(f"split{seed}", base, torch.stack(steps), root, labels, bias)


def logits(seed: int, a: Tensor, normalises: bool = True, **sizes: int) -> Tensor:
    """The logits of a head on moved features, in float64 and differentiable in a."""
    weight, features, _ = raw(seed, **sizes)
    f0, *d = features.double()
    phi = f0 + torch.einsum("k,knd->nd", a, torch.stack(d))
    phi = phi / phi.norm(dim=1, keepdim=True) if normalises else phi
    return phi @ weight.double().T


def points(count: int, directions: int = DIRECTIONS) -> list[np.ndarray]:
    """Random coefficients."""
    generator = np.random.default_rng(0)
    return [generator.normal(size=directions) for _ in range(count)]
