r"""A standard model whose weights move along directions: its logits, loss, gradient, linearisation.

One backward pass gives the derivatives of a loss in all coefficients,
\(\partial L / \partial a_k = \langle \nabla_\theta L, \tau_k \rangle\).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving.buffers import OpenStatistics, moving_buffers
from tangent_arithmetic.arithmetic.solving.groups import along
from tangent_arithmetic.arithmetic.solving.losses import Term
from tangent_arithmetic.arithmetic.solving.reduced import Reduced, reduce
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import EvalBatches, to_device
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.statedict import State, move
from tangent_arithmetic.tangent.functional import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float64

Terms = Callable[[list[Reduced]], list[Term]]  # an objective on splits


@dataclass
class Merged:
    """A standard encoder whose weights move along directions; it is changed in place.

    Attributes:
        encoder: the encoder.
        vectors: the directions, by name of weight.
        splits: labelled images with their heads.
        folder: where large arrays are mapped.
        units: forward passes of all images that have been spent; a gradient counts three, and a
            pass along K directions 1 + 2K.
    """

    encoder: ModuleEncoder
    vectors: Sequence[State]
    splits: Sequence[Split]
    folder: Path | None = None
    units: float = 0.0
    theta0: dict[str, Tensor] = field(init=False)
    buffers: list[str] = field(init=False)  # that the directions move

    def __post_init__(self) -> None:
        """Keeps theta0."""
        self.theta0 = {name: value.clone() for name, value in self.encoder.weights().items()}
        self.buffers = moving_buffers(self.encoder, self.vectors)

    def movable(self) -> dict[str, Tensor]:
        """The parameters, and the buffers that the directions move; not copied."""
        buffers = {n: b for n, b in self.encoder.named_buffers() if n in self.buffers}
        return {**dict(self.encoder.named_parameters()), **buffers}

    def derived(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which all that moves has gradients."""
        return OpenStatistics() if self.buffers else contextlib.nullcontext()

    @torch.no_grad()
    def weights(self, a: Float64[np.ndarray, " directions"]) -> dict[str, Tensor]:
        """theta0 + the sum of a_k tau_k."""
        step = {n: v.to(self.theta0[n].device) for n, v in along(self.vectors, a).items()}
        return move(self.theta0, step)

    def place(self, a: Float64[np.ndarray, " directions"]) -> None:
        """Moves the encoder to a point."""
        self.encoder.load_weights(self.weights(a))

    @torch.no_grad()
    def logits(self, a: Float64[np.ndarray, " directions"]) -> list[Reduced]:
        """The logits of all images at a point, as `Reduced` without directions."""
        self.place(a)
        self.units += 1
        found = []
        for split in self.splits:
            compute = compute_of(split, self.encoder)
            parts = [
                (split.head(forward(self.encoder, images, compute)).cpu(), labels.cpu())
                for images, labels in _batches(split, self.encoder, "logits")
            ]
            logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
            steps = torch.zeros(0, *logits.shape)
            found.append(Reduced(split.name, logits, steps, None, labels))
        return found

    def linearise(self, a: Float64[np.ndarray, " directions"]) -> list[Reduced]:
        """The images along the directions at a point, to first order."""
        self.place(a)
        self.units += 1 + 2 * len(self.vectors)
        return [
            reduce(linearized(self.encoder), self.vectors, split, self.folder)
            for split in self.splits
        ]

    def value_and_gradient(
        self, a: Float64[np.ndarray, " directions"], terms: Terms | None = None
    ) -> tuple[float, Float64[np.ndarray, " directions"]]:
        """An objective on the splits, and its gradient in the coefficients.

        Args:
            a: the point.
            terms: the objective, which costs a pass for all logits more; if None the mean over
                splits of their cross-entropies.
        """
        total, pulled = (0.0, None) if terms is None else pulled_back(terms, self.logits(a))
        self.place(a)
        self.units += 3
        moved = self.movable()
        flags = {name: p.requires_grad for name, p in moved.items()}
        try:
            for p in moved.values():
                p.requires_grad_(True).grad = None
            for number, split in enumerate(self.splits):
                count, done, compute = _count(split), 0, compute_of(split, self.encoder)
                for images, labels in _batches(split, self.encoder, "gradient"):
                    with self.derived():
                        features = forward(self.encoder, images, compute)
                    logits = split.head(features)
                    if pulled is None:
                        loss = _cross_entropy(logits, labels)
                        loss = loss * len(labels) / (count * len(self.splits))
                        total += float(loss.detach())
                    else:
                        slopes = pulled[number][done : done + len(labels)]
                        loss = (logits * slopes.to(logits)).sum()
                        done += len(labels)
                    loss.backward()
            gradient = [_product(moved, tau) for tau in self.vectors]
        finally:
            for name, p in moved.items():
                p.requires_grad_(flags[name]).grad = None
        return total, np.asarray(gradient, dtype=np.float64)


def pulled_back(terms: Terms, splits: list[Reduced]) -> tuple[float, tuple[Tensor, ...]]:
    """An objective of logits, and its gradient in those of each split."""
    logits = [split.base.requires_grad_() for split in splits]
    losses = [
        term.factor * term.loss(term.reduced.base.double(), term.reduced.labels, term.shares)
        for term in terms(splits)
    ]
    value = torch.stack(losses).sum()
    return float(value.detach()), torch.autograd.grad(value, logits)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))
    return F.cross_entropy(logits, labels)


def compute_of(split: Split, encoder: ModuleEncoder) -> Compute:
    """Where and in which precision a split is computed."""
    return split.compute or Compute.of(encoder.weights())


def forward(encoder: ModuleEncoder, images: Tensor, compute: Compute) -> Tensor:
    """The features of a batch; in float32, as heads are."""
    with compute.autocast():
        features: Tensor = encoder(images)
    return features.float()


def _product(moved: Mapping[str, Tensor], tau: State) -> float:
    """The inner product of what moves' gradients and a direction, in float64."""
    total = 0.0
    for name, value in tau.items():
        gradient = moved[name].grad if name in moved else None
        if gradient is not None:
            total += float((gradient.double() * value.to(gradient.device).double()).sum())
    return total


def _count(split: Split) -> int:
    if isinstance(split.batches, EvalBatches):
        return len(split.batches.pictures)
    return sum(len(labels) for _, labels in split.batches)


def _batches(split: Split, encoder: ModuleEncoder, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a split, moved with the encoder and the head to the device, with progress."""
    compute = compute_of(split, encoder)
    encoder.to(compute.device)
    split.head.to(compute.device)
    total = len(split.batches) if isinstance(split.batches, EvalBatches) else None
    with evaluating(encoder):
        for batch in progress(split.batches, f"{what} on {split.name}", total):
            yield to_device(batch, compute.device)
