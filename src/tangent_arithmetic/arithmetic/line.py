r"""The exact line: where on a line of coefficients an image is right, and accuracy as a function.

Along \(a + \lambda u\) the logits of a linear model are lines \(g_j(\lambda) = b_j + \lambda m_j\),
one a class, up to a positive factor. Class c is predicted where \(g_c\) is their upper envelope:

\[ \max_{m_c > m_j} \frac{b_j - b_c}{m_c - m_j} \le \lambda < \min_{m_c < m_j}
   \frac{b_j - b_c}{m_c - m_j} \]

an interval, which may be empty. So the accuracy of a split is a step function of all real lambda,
and its maximum needs no grid. Step functions are continuous from the right: at a breakpoint, where
classes tie, the value is that just above it. Of classes with the same line the first one is
predicted, as by `argmax`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.logits import Logits, linear_logits
from tangent_arithmetic.arithmetic.steps import Steps
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import Encoder, is_linear
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import State

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

logger = logging.getLogger(__name__)

CHUNK = 2**20  # logits that are compared at a time, in float64


@dataclass(frozen=True)
class Intervals:
    """For each image the coefficients low <= lambda < high at which something holds.

    Attributes:
        low: infinite where there is no lower end, and where there is no such coefficient.
        high: infinite where there is no upper end; -inf where there is no such coefficient.
    """

    low: Float64[Tensor, " images"]
    high: Float64[Tensor, " images"]

    def share(self) -> Steps:
        """The fraction of images at each coefficient.

        Raises:
            UsageError: if there are no images.
        """
        if not len(self.low):
            raise UsageError("no images to evaluate on: the split is empty")
        some = self.low < self.high
        low, high = self.low[some], self.high[some]
        begun, ended = low[low.isfinite()], high[high.isfinite()]
        edges, place = torch.cat([begun, ended]).unique(return_inverse=True)
        changes = torch.ones(len(place), dtype=torch.int64)
        changes[len(begun) :] = -1
        change = torch.zeros(len(edges), dtype=torch.int64).index_add(0, place, changes)
        first = (low == -math.inf).sum()[None]
        steps = change != 0  # an image may begin where another one ends
        count = torch.cat([first, first + change.cumsum(0)[steps]])
        return Steps(edges[steps], count.double() / len(self.low))


def obstacle(logits: Logits) -> str | None:
    """Why a split has no exact line; None if it has one.

    Only the predicted class follows from lines: not mean average precision, which compares images,
    nor the classes of a head that divides by the norm of the features and then adds a bias.
    """
    if logits.labels.ndim != 1:
        return f"{logits.dataset} has several labels an image, and so no accuracy"
    if logits.gram is not None and logits.bias is not None:
        return f"the head of {logits.dataset} normalises features and adds a bias"
    return None


def affine(
    logits: Logits, start: Sequence[float], direction: Sequence[float], parts: int = 1
) -> Iterator[tuple[slice, Float64[Tensor, "chunk classes"], Float64[Tensor, "chunk classes"]]]:
    """The lines of all classes along start + lambda * direction, `CHUNK` logits at a time.

    Args:
        logits: of this rank's share.
        start: the coefficients at lambda = 0.
        direction: u, one number a task vector.
        parts: numbers held for each logit, by which chunks are smaller.

    Yields:
        Which images, the logits at lambda = 0, and their slopes; up to a factor for each image.

    Raises:
        UsageError: if predictions do not follow from lines, see `obstacle`, or are not finite.
    """
    if (reason := obstacle(logits)) is not None:
        raise UsageError(
            f"{reason}: its predictions are not those of straight lines. Use a sweep over "
            "coefficients, or a head without bias or without normalisation"
        )
    images, classes = logits.base.shape
    size = max(1, CHUNK // max(1, classes * parts))
    for first in range(0, images, size):
        rows = slice(first, first + size)
        base = logits.base[rows].double()
        if logits.bias is not None:
            base = base + logits.bias.double()
        slope = torch.zeros_like(base)
        for a, u, step in zip(start, direction, logits.steps, strict=True):
            base = base if a == 0 else base + a * step[rows].double()
            slope = slope if u == 0 else slope + u * step[rows].double()
        if not bool(base.isfinite().all() and slope.isfinite().all()):
            raise UsageError(
                f"the logits of {logits.dataset} are not finite, expected finite numbers; try "
                "--precision=fp32, or other weights"
            )
        yield rows, base, slope


def intervals(
    logits: Logits,
    direction: Sequence[float],
    start: Sequence[float] | None = None,
    classes: Int64[Tensor, " images"] | None = None,
) -> Intervals:
    """Where each image is predicted to be of a class, along start + lambda * direction.

    Args:
        logits: of this rank's share.
        direction: u, one number a task vector.
        start: the coefficients at lambda = 0; None for theta0.
        classes: a class for each image; None for its label.

    Raises:
        UsageError: if predictions do not follow from lines, see `affine`.
    """
    start = [0.0] * len(direction) if start is None else start
    wanted = logits.labels if classes is None else classes
    low, high = torch.zeros(2, len(wanted), dtype=torch.float64)
    for rows, base, slope in affine(logits, start, direction):
        low[rows], high[rows] = _envelope(base, slope, wanted[rows].long())
    return Intervals(low, high)


def _envelope(base: Tensor, slope: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The interval in which the line of a class is the highest, for each row of lines."""
    valid = (classes >= 0) & (classes < base.shape[1])
    own = classes.where(valid, 0)[:, None]
    ahead, gain = base.gather(1, own) - base, slope.gather(1, own) - slope
    crossing = -ahead / gain
    low = crossing.where(gain > 0, -math.inf).amax(dim=1)
    high = crossing.where(gain < 0, math.inf).amin(dim=1)
    first = torch.arange(base.shape[1])[None] < own
    below = (gain == 0) & ((ahead < 0) | ((ahead == 0) & first))
    never = below.any(dim=1) | ~valid | ~(low < high)
    return low.where(~never, math.inf), high.where(~never, -math.inf)


def accuracy(
    logits: Logits, direction: Sequence[float], start: Sequence[float] | None = None
) -> Steps:
    """Top-1 accuracy over the images of all ranks, along start + lambda * direction.

    Args and errors are those of `intervals`.
    """
    shares = ddp.gather(intervals(logits, direction, start))
    low, high = (torch.cat([getattr(share, end) for share in shares]) for end in ("low", "high"))
    return Intervals(low, high).share()


def lines(encoder: Encoder, tau: State, splits: Sequence[Split]) -> list[Steps] | None:
    """The accuracy of each split at theta0 + lambda * tau, for all lambda.

    Costs no pass over images whose features are kept, see `arithmetic/features.py`, else one.

    Args:
        encoder: at theta0.
        tau: a task vector, by name.
        splits: with labels.

    Returns:
        None, with a note on the log, if a split has no exact line: that of a standard encoder,
        those of `obstacle`, those whose head is no `ClassificationHead`, and those whose batches
        can be read only once.
    """
    if not is_linear(encoder):
        return None
    found = []
    for split in splits:
        if not isinstance(split.head, ClassificationHead) or isinstance(split.batches, Iterator):
            logger.info("no exact line: %s has a head or batches of another kind", split.name)
            return None
        logits = linear_logits(encoder, {"tau": tau}, split)
        reasons = [reason for reason in ddp.gather(obstacle(logits)) if reason]
        if reasons:
            logger.info("no exact line: %s", reasons[0])
            return None
        found.append(accuracy(logits, [1.0]))
    return found
