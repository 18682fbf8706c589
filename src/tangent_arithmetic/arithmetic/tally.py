"""The metrics of a split, gathered over batches and ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.metrics import METRICS, Parts, Statistic
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)


def statistics(dimensions: int) -> list[Statistic]:
    """The statistics behind the metrics of labels with so many dimensions, each once."""
    return list(dict.fromkeys(metric.statistic for metric in METRICS[dimensions]))


@dataclass
class Tally:
    """The statistics of some images, one batch after the other.

    Attributes:
        dimensions: of the labels; 0 as long as there are no images.
        num_images: the number of images.
        parts: the tensors of each statistic; of one that adds up there is one part.
        undefined: the number of images with a logit that is no number, which count as wrong.
    """

    dimensions: int = 0
    num_images: int = 0
    parts: list[list[Parts]] = field(default_factory=list)
    undefined: Tensor | int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds the images of a batch.

        Args:
            logits: shape (images, classes).
            labels: int64 (images,), or zeros and ones (images, classes).

        Raises:
            UsageError: for labels of another shape.
        """
        if not len(labels):
            return
        if labels.shape != logits.shape[: labels.ndim]:
            images, classes = logits.shape
            raise UsageError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of {classes} classes: "
                f"expected classes ({images},), or zeros and ones ({images}, {classes}); take a "
                "head with the classes of the data set"
            )
        kinds = statistics(labels.ndim)
        undefined = logits.isnan().any(dim=1)
        self.undefined = self.undefined + undefined.sum()  # no wait for a GPU
        if labels.ndim == 1:  # average precision ranks such images last by itself
            right = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
            logits = torch.where(undefined[:, None], -1.0 * right, logits)
        self.dimensions, self.num_images = labels.ndim, self.num_images + len(labels)
        self.parts = self.parts or [[] for _ in kinds]
        for statistic, parts in zip(kinds, self.parts, strict=True):
            parts.append(statistic.of(logits, labels))
            if statistic.adds_up:
                parts[:] = [statistic.joined(parts)]

    def joined(self) -> Tally:
        """The same with one part for each statistic, on the CPU."""
        kinds = statistics(self.dimensions) if self.dimensions else []
        parts = [s.joined(parts) for s, parts in zip(kinds, self.parts, strict=True)]
        on_cpu = [[tuple(tensor.cpu() for tensor in part)] for part in parts]
        return Tally(self.dimensions, self.num_images, on_cpu, int(self.undefined))


def scores(tallies: Sequence[Tally]) -> list[dict[str, float]]:
    """The metrics of each tally over the images of all ranks.

    Some of several points may lie where a model is not defined, such as those where the variances
    of a batch normalisation are extrapolated below zero: there they count as wrong, with a warning.

    Returns:
        For each {metric: value, ..., "num_images": number of images}, the main metric first; none
        for no tallies.

    Raises:
        UsageError: if there are no images, a metric is undefined for their labels, or logits are no
            numbers at any point.
    """
    if not tallies:
        return []
    ranks = ddp.gather([tally.joined() for tally in tallies])
    return _scores(list(zip(*ranks, strict=True)))


def _scores(points: Sequence[Sequence[Tally]]) -> list[dict[str, float]]:
    """The metrics at each point, from the shares of the ranks."""
    found = [_score(shares) for shares in points]
    undefined = [sum(int(share.undefined) for share in shares) for shares in points]
    if not any(undefined):
        return found
    message = (
        f"the logits of {max(undefined)} of {found[0]['num_images']} examples are not numbers "
        "(NaN): the weights, the task vectors or the examples hold NaN or overflow"
    )
    if all(undefined):
        raise UsageError(message)
    if ddp.is_main_process():
        which = f"at {sum(map(bool, undefined))} of {len(undefined)} points"
        logger.warning("%s, %s; they count as wrong", message, which)
    return found


def _score(shares: Sequence[Tally]) -> dict[str, float]:
    shares = [share for share in shares if share.num_images]  # a rank may have no images
    if not shares:
        raise UsageError("no images to evaluate on: the split is empty")
    count = sum(share.num_images for share in shares)
    metrics, kinds = METRICS[shares[0].dimensions], statistics(shares[0].dimensions)
    joined = [s.joined([share.parts[i][0] for share in shares]) for i, s in enumerate(kinds)]
    found = {m.name: m.score(*joined[kinds.index(m.statistic)]) for m in metrics}
    return {**found, "num_images": count}


def measured(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics of some images, on this rank alone, the main one first."""
    tally = Tally()
    tally.add(logits, labels)
    (found,) = _scores([[tally.joined()]])
    del found["num_images"]
    return found
