"""Logits of some images as a function of the coefficients, for rules that learn by batches.

`StoredImages` computes them from stored logits of a linear model, `NetworkImages` by the network of
a standard one. Both are differentiable in the coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.merged import Merged, compute_of
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.tangent.functional import functional_call

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64, UInt8


class LabelledImages(Protocol):
    """Labelled images of several splits, whose logits follow from coefficients.

    Attributes:
        labels: of each split: (images,), or uint8 (images, classes).
        directions: number of coefficients.
    """

    labels: list[Int64[Tensor, " images"] | UInt8[Tensor, "images classes"]]
    directions: int

    def logits(
        self, a: Float64[Tensor, " directions"], chosen: Mapping[int, Int64[Tensor, " some"]]
    ) -> dict[int, Float[Tensor, "some classes"]]:
        """The logits of some images of some splits, differentiable in the coefficients.

        Args:
            a: the coefficients.
            chosen: indices of images, by number of the split.
        """


class StoredImages:
    """Images of a linear model, from what `reduce` has stored of them."""

    def __init__(self, splits: Sequence[Reduced]) -> None:
        self.splits = splits
        self.labels = [split.labels for split in splits]
        self.directions = len(splits[0].steps)

    def logits(
        self, a: Float64[Tensor, " directions"], chosen: Mapping[int, Int64[Tensor, " some"]]
    ) -> dict[int, Float[Tensor, "some classes"]]:
        """See `LabelledImages`; in float64."""
        return {split: _moved(self.splits[split].take(own), a) for split, own in chosen.items()}


def _moved(images: Reduced, a: Tensor) -> Tensor:
    logits = images.base.double() + torch.einsum("k,knc->nc", a, images.steps.double())
    if images.root is not None:
        point = torch.cat([torch.ones(1, dtype=a.dtype), a])
        norms = (images.root.double() @ point).norm(dim=1, keepdim=True)
        logits = logits / norms.clamp_min(1e-12)
    return logits if images.bias is None else logits + images.bias.double()


class NetworkImages:
    """Images of a standard model, which runs on them; images and directions are held in memory.

    Args:
        model: the model, its directions and its splits; its encoder is not moved.
    """

    def __init__(self, model: Merged) -> None:
        self.model, self.encoder, self.splits = model, model.encoder, model.splits
        self.compute = compute_of(self.splits[0], self.encoder)
        self.images = []
        self.labels = []
        for split in self.splits:
            images, labels = (torch.cat(column) for column in zip(*split.batches, strict=True))
            self.images.append(images)
            self.labels.append(labels)
        self.directions = len(model.vectors)
        self.moves: dict[str, tuple[Tensor, Tensor]] = {}  # name -> which directions, their weights
        for name, p in model.movable().items():
            which = [k for k, tau in enumerate(model.vectors) if name in tau]
            if which:
                steps = torch.stack([model.vectors[k][name].to(p) for k in which])
                self.moves[name] = torch.tensor(which), steps

    def logits(
        self, a: Float64[Tensor, " directions"], chosen: Mapping[int, Int64[Tensor, " some"]]
    ) -> dict[int, Float[Tensor, "some classes"]]:
        """See `LabelledImages`; one pass of the network, in evaluation mode, for all splits."""
        device = self.compute.device
        self.encoder.eval().to(device)
        weights = {name: p.detach() for name, p in self.model.movable().items()}
        for name, (which, steps) in self.moves.items():
            move = torch.tensordot(a[which].to(steps), steps, dims=1)
            weights[name] = weights[name] + move.to(device)
        inputs = torch.cat([self.images[split][own] for split, own in chosen.items()])
        with self.compute.autocast(), self.model.derived():
            features = functional_call(self.encoder, weights, (inputs.to(device),)).float()
        parts = features.split([len(own) for own in chosen.values()])
        return {
            split: self.splits[split].head.to(device)(part).cpu()
            for split, part in zip(chosen, parts, strict=True)
        }
