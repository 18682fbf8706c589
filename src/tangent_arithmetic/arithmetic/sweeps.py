r"""Evaluation over values: top-1 accuracy, and sweeps over coefficients.

For a linear model a whole sweep costs one pass, since its features are affine in the coefficient
(`arithmetic/features.py`). For a standard model each image is read and moved once, and meets the
weights of every coefficient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.data.loading import EvalBatches, to_device
from tangent_arithmetic.encoders.base import Encoder, LinearEncoder, is_linear
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.statedict import State

HELD_BYTES = 256 * 2**20  # images that a sweep over coefficients keeps on the device

Batches = EvalBatches | Iterable[Sequence[Tensor]]  # (images, labels); this rank's share
Terms = Sequence[tuple[float, State]]  # a point: theta + sum of coefficient * task vector


class Accuracy(TypedDict):
    """Top-1 accuracy in [0, 1], and the number of images it is of, over all ranks."""

    top1: float
    num_images: int


@dataclass(frozen=True)
class Split:
    """A labelled split with its head, ready for evaluation.

    Attributes:
        name: of the split, for messages and keys.
        head: gives logits (batch, classes) of features.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.
        cache: folder where features of linear models are kept; None keeps none.
        whole: images of the split that these are a sample of; None if these are all.
    """

    name: str
    head: nn.Module
    batches: Batches
    compute: Compute | None = None
    cache: Path | None = None
    whole: int | None = None

    @property
    def num_images(self) -> int | None:
        """Images to evaluate on, over all ranks, if known."""
        return len(self.batches.pictures) if isinstance(self.batches, EvalBatches) else None

    def accuracy(self, encoder: Encoder) -> Accuracy:
        """See `accuracy`."""
        return accuracy(encoder, self.head, self.batches, self.compute, self.cache)

    def sweep(self, encoder: Encoder, tau: State, coefs: Sequence[float]) -> list[float]:
        """Top-1 at each coefficient, see `sweep`."""
        found = sweep(encoder, tau, coefs, self.head, self.batches, self.compute, self.cache)
        return [each["top1"] for each in found]


def accuracy(
    encoder: Encoder,
    head: nn.Module,
    batches: Batches,
    compute: Compute | None = None,
    cache: Path | None = None,
) -> Accuracy:
    """Top-1 accuracy of an encoder with a head.

    Args:
        encoder: standard or linear; unchanged.
        head: gives logits (batch, classes) of features.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.
        cache: folder where features of linear models are kept; None keeps none.
    """
    if is_linear(encoder):
        start = encoder.displacement()
        return _linear(encoder, [start], [[1.0]], head, batches, compute, cache)[0]
    return _standard(encoder, [[]], head, batches, compute)[0]


def sweep(
    encoder: Encoder,
    tau: State,
    coefs: Sequence[float],
    head: nn.Module,
    batches: Batches,
    compute: Compute | None = None,
    cache: Path | None = None,
) -> list[Accuracy]:
    """Top-1 accuracy at theta + coef * tau for each coefficient.

    Args:
        encoder: at theta; standard or linear. Unchanged.
        tau: the task vector, by name.
        coefs: the coefficients.
        head: gives logits (batch, classes) of features.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.
        cache: folder where features of linear models are kept; None keeps none.

    Raises:
        UsageError: if tau has names or shapes that theta does not have.
    """
    if is_linear(encoder):
        start = encoder.displacement()
        moved = any(bool(step.any()) for step in start.values())
        vectors = [start, tau] if moved else [tau]
        points = [[1.0, coef] if moved else [coef] for coef in coefs]
        return _linear(encoder, vectors, points, head, batches, compute, cache)
    return _standard(encoder, [[(coef, tau)] for coef in coefs], head, batches, compute)


@torch.no_grad()
def _linear(
    encoder: LinearEncoder,
    vectors: Sequence[State],
    points: Sequence[Sequence[float]],
    head: nn.Module,
    batches: Batches,
    compute: Compute | None,
    cache: Path | None,
) -> list[Accuracy]:
    """Top-1 at theta0 + sum_t points[i][t] * vectors[t] for each i, from one pass over images."""
    compute = compute or Compute.of(encoder.weights())
    head = head.to(compute.device)
    found = linear_features(encoder, vectors, batches, compute, cache).to(compute.device)
    counts = torch.zeros(len(points) + 1, dtype=torch.int64, device=compute.device)
    if len(found.labels):
        hits = [_hits(head(found.at(point).float()), found.labels) for point in points]
        counts[:-1] = torch.stack(hits)
        counts[-1] = len(found.labels)
    return _accuracies(counts)


@torch.no_grad()
def _standard(
    encoder: Encoder,
    points: Sequence[Terms],
    head: nn.Module,
    batches: Batches,
    compute: Compute | None,
) -> list[Accuracy]:
    compute = compute or Compute.of(encoder.weights())
    counts = torch.zeros(len(points) + 1, dtype=torch.int64, device=compute.device)
    for i, logits, labels in logits_at(encoder, points, head, batches, compute):
        counts[i] += _hits(logits, labels)
        counts[-1] += len(labels) if i == 0 else 0
    return _accuracies(counts)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images of a batch get their label."""
    return (logits.argmax(dim=1) == labels).sum()


def _accuracies(counts: Tensor) -> list[Accuracy]:
    """Top-1 at each point, of counts of hits and, last, of images, over all ranks."""
    *correct, total = ddp.all_sum(counts).tolist()
    return [{"top1": hit / total, "num_images": total} for hit in correct]


@torch.no_grad()
def logits_at(
    encoder: Encoder,
    points: Sequence[Terms],
    head: nn.Module,
    batches: Batches,
    compute: Compute | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Logits of a standard encoder at several points; each image is read and moved once.

    As many batches as `HELD_BYTES` allows are evaluated for one point after the other, so that its
    weights are computed once for them. However it ends, the encoder is at theta again.

    Args:
        encoder: at theta.
        points: each the terms that are added to theta.
        head: gives logits (batch, classes) of features.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.

    Yields:
        The index of the point, logits, float32 (batch, classes), and labels, int64 (batch,).

    Raises:
        UsageError: if a term has names or shapes that theta does not have.
    """
    compute = compute or Compute.of(encoder.weights())
    encoder.eval().to(compute.device)
    head = head.to(compute.device)
    own = encoder.weights()
    vectors = {id(tau): tau for point in points for _, tau in point}
    for tau in vectors.values():
        statedict.check_part(own, tau, "theta and tau")
    if len(vectors) == 1:  # it stays on the device; several are moved when they are added
        tau = {
            name: value.to(compute.device) for name, value in next(iter(vectors.values())).items()
        }
        points = [[(coef, tau) for coef, _ in point] for point in points]
    moves = bool(vectors)
    theta = {name: value.clone() for name, value in own.items()} if moves else own
    label = f"evaluating {getattr(batches, 'name', '')}".strip()

    def meetings() -> Iterator[tuple[int, Tensor, Tensor]]:
        for held in held_batches(batches, compute.device):
            for i, point in enumerate(points):
                if moves:
                    _place(own, theta, point)
                for images, labels in held:
                    yield i, images, labels

    total = len(batches) * len(points) if isinstance(batches, EvalBatches) else None
    try:
        for i, images, labels in progress(meetings(), label, total):
            with compute.autocast():
                features = encoder(images)
            yield i, head(features.float()), labels
    finally:
        if moves:
            encoder.load_weights(theta)


def _place(own: State, theta: State, terms: Terms) -> None:
    """Puts theta + the sum of the terms into the tensors of `own`."""
    device = next(iter(own.values())).device
    coef, total = terms[0] if len(terms) == 1 else (1.0, _sum(terms, device))
    for name in own.keys() - total.keys():
        own[name].copy_(theta[name])
    moved = {name: value.to(device) for name, value in total.items()}
    statedict.move_into(own, theta, moved, coef)


def _sum(terms: Terms, device: torch.device) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for coef, tau in terms:
        for name, value in tau.items() if coef else ():
            step = coef * value.to(device)
            total[name] = total[name] + step if name in total else step
    return total


def held_batches(batches: Batches, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches on the device, as many at a time as `HELD_BYTES` allows."""
    held: list[tuple[Tensor, Tensor]] = []
    size = 0
    for batch in batches:
        held.append(to_device(batch, device))
        size += held[-1][0].nbytes
        if size + held[-1][0].nbytes > HELD_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def sweep_splits(
    encoder: Encoder, tau: State, coefs: Sequence[float], splits: Sequence[Split]
) -> dict[float, dict[str, float]]:
    """Top-1 on several splits at each coefficient.

    Returns:
        coefficient -> {"<split>:top1": accuracy}.
    """
    found: dict[float, dict[str, float]] = {coef: {} for coef in coefs}
    for split in splits:
        for coef, top1 in zip(coefs, split.sweep(encoder, tau, coefs), strict=True):
            found[coef][f"{split.name}:top1"] = top1
    return found


def smallest(splits: Iterable[Split]) -> int | None:
    """Images of the smallest of these splits, if all are known."""
    sizes = [split.num_images for split in splits]
    known = [size for size in sizes if size is not None]
    return min(known) if known and len(known) == len(sizes) else None


def by_text(metrics: Mapping[float, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Metrics keyed by coefficients as short decimals, as results files have them."""
    return {str(coef): found for coef, found in metrics.items()}
