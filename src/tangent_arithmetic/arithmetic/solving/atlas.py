r"""aTLAS, a published rule for the same coefficients, to compare with.

A coefficient for each task and parameter tensor (`--coefficients=block`), from zero, by AdamW on
the sum over tasks of the cross-entropies of a batch; the coefficients after the epoch with the best
accuracy on the same images are kept. Published settings are the defaults of `Recipe`. The published
program augments images; here they are prepared as for evaluation.

Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
arXiv:2407.02880; the settings are the defaults of its program for task addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.losses import cross_entropy
from tangent_arithmetic.arithmetic.solving.minibatches import LabelledImages
from tangent_arithmetic.runtime.logs import progress

if TYPE_CHECKING:
    from jaxtyping import Float64

CHUNK = 64  # images of each split that are evaluated at once


@dataclass(frozen=True)
class Recipe:
    """How aTLAS learns.

    Attributes:
        rate: learning rate.
        decay: weight decay, towards zero coefficients.
        batch: images of a step, those of all splits together.
        epochs: passes over the images of the smallest split.
        clip: largest norm of a gradient.
    """

    rate: float = 1e-3
    decay: float = 0.1
    batch: int = 128
    epochs: int = 20
    clip: float = 1.0


@dataclass(frozen=True)
class Learned:
    """Learned coefficients.

    Attributes:
        coefficients: those of the best epoch.
        epoch: that epoch; 0 for zero coefficients.
        accuracies: mean over splits, at zero and after each epoch.
        steps: of the optimizer.
    """

    coefficients: Float64[np.ndarray, " directions"]
    epoch: int
    accuracies: list[float]
    steps: int


def atlas(images: LabelledImages, recipe: Recipe | None = None, seed: int = 0) -> Learned:
    """Coefficients by the published rule.

    Args:
        images: labelled images along the directions of a grouping.
        recipe: how to learn.
        seed: of the batches.
    """
    recipe = recipe or Recipe()
    a = torch.zeros(images.directions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([a], lr=recipe.rate, weight_decay=recipe.decay)
    generator = torch.Generator().manual_seed(seed)
    counts = [len(labels) for labels in images.labels]
    size = max(1, recipe.batch // len(counts))
    points, accuracies, steps = [a.detach().clone()], [_accuracy(images, a)], 0
    for _ in progress(range(recipe.epochs), "aTLAS", recipe.epochs):
        orders = [torch.randperm(n, generator=generator).split(size) for n in counts]
        for batches in zip(*orders, strict=False):  # as many as the smallest split has
            optimizer.zero_grad()
            _loss(images, a, dict(enumerate(batches))).backward()
            torch.nn.utils.clip_grad_norm_([a], recipe.clip)
            optimizer.step()
            steps += 1
        points.append(a.detach().clone())
        accuracies.append(_accuracy(images, a))
    best = int(np.argmax(accuracies))
    return Learned(points[best].numpy(), best, accuracies, steps)


def _loss(images: LabelledImages, a: Tensor, chosen: Mapping[int, Tensor]) -> Tensor:
    """The sum over splits of the mean cross-entropies of their batches."""
    losses = []
    for split, logits in images.logits(a, chosen).items():
        shares = torch.full((len(logits),), 1 / len(logits), dtype=logits.dtype)
        losses.append(cross_entropy(logits, images.labels[split][chosen[split]], shares))
    return torch.stack(losses).sum()


@torch.no_grad()
def _accuracy(images: LabelledImages, a: Tensor) -> float:
    """The mean over splits of top-1 accuracy; of several labels an image, of correct answers."""
    right = np.zeros(len(images.labels))
    chunks = [torch.arange(len(labels)).split(CHUNK) for labels in images.labels]
    for number in range(max(map(len, chunks))):
        chosen = {split: own[number] for split, own in enumerate(chunks) if number < len(own)}
        for split, logits in images.logits(a, chosen).items():
            labels = images.labels[split][chosen[split]]
            several = labels.ndim == 2
            correct = (logits > 0) == labels.bool() if several else logits.argmax(1) == labels
            right[split] += float(correct.double().mean()) * len(labels)
    return float((right / [len(labels) for labels in images.labels]).mean())
