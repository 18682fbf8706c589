r"""Evaluation: the metrics of a model on a split, and sweeps over coefficients.

Which metrics follows from the labels, see `arithmetic/metrics.py`.

For a linear model a whole sweep costs one pass, since its features are affine in the coefficient
(`arithmetic/features.py`). For a standard model each image is read and moved to the device once,
and evaluated at every coefficient but 0, where features are cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.features import Features, linear_features, standard_features
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.tally import Tally, scores
from tangent_arithmetic.data.loading import EvalBatches, to_device
from tangent_arithmetic.encoders.base import Encoder, LinearEncoder, is_linear
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.statedict import State
from tangent_arithmetic.tangent import find_caches
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.functional import evaluating

if TYPE_CHECKING:
    from jaxtyping import Float32

HELD_BYTES = 256 * 2**20  # images that a sweep keeps on the device

Batches = EvalBatches | Iterable[Sequence[Tensor]]  # (images, labels); this rank's share
Terms = Sequence[tuple[float, State]]  # a point: theta + sum of coefficient * task vector


Metrics = dict[str, float]  # by name, the main one first, and "num_images" over all ranks


@dataclass(frozen=True)
class Split:
    """A labelled split with its head, on which encoders are evaluated.

    Attributes:
        name: for messages and keys.
        head: maps features to logits (batch, classes).
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.
        cache: folder of cached features, of linear models and of standard ones at their own
            weights; None for no cache.
        whole: size of the split if `batches` is a sample of it, else None.
    """

    name: str
    head: nn.Module
    batches: Batches
    compute: Compute | None = None
    cache: Path | None = None
    whole: int | None = None

    @property
    def num_images(self) -> int | None:
        """Number of images to evaluate on, over all ranks, if known."""
        return len(self.batches.pictures) if isinstance(self.batches, EvalBatches) else None

    def accuracy(self, encoder: Encoder) -> Metrics:
        """The metrics of an encoder, standard or linear, which is left unchanged.

        Returns:
            "top1" and "balanced", or "map" for several labels an image; and "num_images".
        """
        if is_linear(encoder):
            return self._linear(encoder, [encoder.displacement()], [[1.0]])[0]
        return self._standard(encoder, [[]])[0]

    def sweep(self, encoder: Encoder, tau: State, coefs: Sequence[float]) -> list[float]:
        """The main metric at theta + coef * tau for each coefficient, see `metrics_at`."""
        return [main_of(found) for found in self.metrics_at(encoder, tau, coefs)]

    def metrics_at(self, encoder: Encoder, tau: State, coefs: Sequence[float]) -> list[Metrics]:
        """The metrics at theta + coef * tau for each coefficient.

        Args:
            encoder: at theta, standard or linear; left unchanged.
            tau: the task vector, by name.
            coefs: the coefficients.

        Raises:
            UsageError: if tau has names or shapes that theta lacks.
        """
        if not is_linear(encoder):
            return self._standard(encoder, [[(coef, tau)] for coef in coefs])
        start = encoder.displacement()
        moved = any(bool(step.any()) for step in start.values())
        vectors = [start, tau] if moved else [tau]
        points = [[1.0, coef] if moved else [coef] for coef in coefs]
        return self._linear(encoder, vectors, points)

    def _linear(
        self, encoder: LinearEncoder, vectors: Sequence[State], points: Sequence[Sequence[float]]
    ) -> list[Metrics]:
        """Metrics at theta0 + sum_t points[i][t] * vectors[t] for each i, from one pass."""
        compute = self.compute or Compute.of(encoder.weights())
        features = linear_features(encoder, vectors, self.batches, compute, self.cache)
        return scores(self._tallies(features, points, compute.device))

    def _standard(self, encoder: Encoder, points: Sequence[Terms]) -> list[Metrics]:
        """Metrics at theta + the terms of each point; features at theta itself are cached."""
        compute = self.compute or Compute.of(encoder.weights())
        moved = [i for i, point in enumerate(points) if any(coef for coef, _ in point)]
        if self.cache is None:
            moved = list(range(len(points)))
        tallies = {i: Tally() for i in moved}
        if len(moved) < len(points):
            features = standard_features(encoder, self.batches, compute, self.cache)
            (still,) = self._tallies(features, [[]], compute.device)
            tallies = dict.fromkeys(range(len(points)), still) | tallies
        if moved:
            terms = [points[i] for i in moved]
            for i, logits, labels in logits_at(encoder, terms, self.head, self.batches, compute):
                tallies[moved[i]].add(logits, labels)
        return scores([tallies[i] for i in range(len(points))])

    @torch.no_grad()
    def _tallies(
        self, features: Features, points: Sequence[Sequence[float]], device: torch.device
    ) -> list[Tally]:
        """The tally of this rank's share at each point."""
        head, features = self.head.to(device), features.to(device)
        tallies = [Tally() for _ in points]
        if len(features.labels):
            for tally, point in zip(tallies, points, strict=True):
                tally.add(head(features.at(point).float()), features.labels)
        return tallies


@torch.no_grad()
def logits_at(
    encoder: Encoder,
    points: Sequence[Terms],
    head: nn.Module,
    batches: Batches,
    compute: Compute | None = None,
) -> Iterator[tuple[int, Float32[Tensor, "batch classes"], Tensor]]:
    """Logits of a standard encoder at several points; each image is read and moved once.

    As many batches as fit in `HELD_BYTES` are evaluated at one point after the other, so that the
    weights of a point are computed once for all of them. Even after an error, the encoder is at
    theta again.

    Args:
        encoder: at theta.
        points: for each the terms to add to theta.
        head: maps features to logits.
        batches: (images, labels) of this rank.
        compute: device and precision; None for the encoder's device, in float32.

    Yields:
        The index of the point, logits, and labels as the batches have them.

    Raises:
        UsageError: if a term has names or shapes that theta lacks, or weights are computed from
            others, as those of LoRA.
    """
    compute = compute or Compute.of(encoder.weights())
    encoder.to(compute.device)
    head = head.to(compute.device)
    vectors = {id(tau): tau for point in points for _, tau in point}
    weights = statedict.places(encoder.weights, encoder.identity()) if vectors else {}
    for tau in vectors.values():
        statedict.check_part(weights, tau, "theta and tau")
    if len(vectors) == 1:  # a single vector stays on the device
        (tau,) = vectors.values()
        tau = {name: value.to(compute.device) for name, value in tau.items()}
        points = [[(coef, tau) for coef, _ in point] for point in points]
    theta = {name: value.clone() for name, value in weights.items()}

    def passes() -> Iterator[tuple[int, Tensor, Tensor]]:
        for number, held in enumerate(_held(batches, compute.device)):
            if vectors and number == 0 and isinstance(encoder, nn.Module):
                find_caches(encoder, held[0][0])
            for i, point in enumerate(points):
                if vectors:
                    _place(weights, theta, point)
                    empty_caches(encoder)
                for images, labels in held:
                    yield i, images, labels

    label = f"evaluating {getattr(batches, 'name', '')}".strip()
    total = len(batches) * len(points) if isinstance(batches, EvalBatches) else None
    bar = progress(passes(), label, total)
    try:
        with evaluating(encoder):
            for i, images, labels in bar:
                with compute.autocast():
                    features = encoder(images)
                bar.note(len(images) * ddp.world_size())
                yield i, head(features.float()), labels
    finally:
        if vectors:
            encoder.load_weights(theta)


def _place(weights: State, theta: State, terms: Terms) -> None:
    """Writes theta + the sum of the terms into the tensors of `weights`."""
    device = next(iter(weights.values())).device
    coef, total = terms[0] if len(terms) == 1 else (1.0, _sum(terms, device))
    for name in weights.keys() - total.keys():
        weights[name].copy_(theta[name])
    on_device = {name: value.to(device) for name, value in total.items()}
    statedict.move_into(weights, theta, on_device, coef)


def _sum(terms: Terms, device: torch.device) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for coef, tau in terms:
        for name, value in tau.items() if coef else ():
            step = coef * value.to(device)
            total[name] = total[name] + step if name in total else step
    return total


def _held(batches: Batches, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches on the device, as many at a time as fit in `HELD_BYTES`."""
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
    encoder: Encoder, tau: State, coefs: Sequence[float], splits: Iterable[Split]
) -> dict[float, dict[str, float]]:
    """Metrics on several splits: coefficient -> {"<split>:<metric>": value}."""
    metrics: dict[float, dict[str, float]] = {coef: {} for coef in coefs}
    for split in splits:
        for coef, found in zip(coefs, split.metrics_at(encoder, tau, coefs), strict=True):
            named = {f"{split.name}:{name}": value for name, value in found.items()}
            del named[f"{split.name}:num_images"]
            metrics[coef] |= named
    return metrics


def smallest(splits: Iterable[Split]) -> int | None:
    """Size of the smallest split, if all sizes are known."""
    sizes = [split.num_images for split in splits]
    known = [size for size in sizes if size is not None]
    return min(known) if known and len(known) == len(sizes) else None
