r"""Certificates: how far coefficients may move before an answer of a linear model changes.

At coefficients a, an image's answer p stays as long as its logit is the highest, a convex cell of
coefficients bounded by a hyperplane a class. The nearest one has the Euclidean distance

\[ r = \min_{j \ne p} \frac{g_p - g_j}{\|\nabla_a (g_p - g_j)\|} \]

and a point at that distance is on the cell's boundary: the distance is exact. Along one direction
the answer stays within an interval, see `arithmetic/line.py`. What follows holds for the linear
model on the images measured, and says nothing of other images or of a standard model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.line import Intervals, affine, intervals
from tangent_arithmetic.arithmetic.logits import Logits
from tangent_arithmetic.arithmetic.steps import Plateau
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

SHARES = (1.0, 0.99, 0.95)  # of the answers that stay


@dataclass(frozen=True)
class Flips:
    """The smallest changes of the coefficients that change answers.

    Attributes:
        answers: the predicted class of each image.
        distance: Euclidean length of the smallest change; infinite if none changes the answer.
        change: that change; the answer ties with `other` there.
        other: the class that it changes to; the answer itself if there is none.
    """

    answers: Int64[Tensor, " images"]
    distance: Float64[Tensor, " images"]
    change: Float64[Tensor, "images vectors"]
    other: Int64[Tensor, " images"]


def flips(logits: Logits, at: Sequence[float] | None = None) -> Flips:
    """The smallest change of the coefficients that changes the answer, for each image.

    Args:
        logits: of this rank's share.
        at: the coefficients; None for theta0.

    Raises:
        UsageError: if answers do not follow from lines, see `line.affine`.
    """
    count, images = len(logits.vectors), len(logits.labels)
    at = [0.0] * count if at is None else at
    answers, others = torch.zeros(2, images, dtype=torch.int64)
    distance = torch.zeros(images, dtype=torch.float64)
    change = torch.zeros(images, count, dtype=torch.float64)
    for rows, values, _ in affine(logits, at, [0.0] * count, parts=1 + count):
        own = values.argmax(dim=1, keepdim=True)
        lead = values.gather(1, own) - values
        steps = logits.steps[:, rows].double()  # (K, n, C)
        gains = steps.gather(2, own.expand(count, -1, -1)) - steps
        square = gains.square().sum(dim=0)
        reach = (lead / square.sqrt()).where(square > 0, math.inf)
        distance[rows], other = reach.min(dim=1)
        picked = other[None, :, None].expand(count, -1, -1)
        slope, size = gains.gather(2, picked)[..., 0], square.gather(1, other[:, None])[:, 0]
        factor = -lead.gather(1, other[:, None])[:, 0] / size
        answers[rows] = own[:, 0]
        change[rows] = (factor * slope).where(size > 0, 0.0).T
        others[rows] = other.where(size > 0, own[:, 0])
    return Flips(answers, distance, change, others)


def certified(found: Intervals, share: float) -> Plateau:
    """The range about 0 in which at least a share of the answers stays.

    It is tight: just outside it, fewer stay. Its value is the share that stays in all of it.

    Args:
        found: where each answer stays; of all ranks.
        share: in (0, 1].
    """
    steps = found.share()
    least = math.ceil(share * len(found.low) - 1e-9) / len(found.low)  # a number of images
    low, high = steps.around(0.0, least) or (0.0, 0.0)
    inside = (steps.edges > low) & (steps.edges < high)
    values = torch.cat([steps.at([low, 0.0]), steps.values[1:][inside]])
    return Plateau(low, high, float(values.min()) if low < high else 0.0)


def radius(distance: Float64[Tensor, " images"], share: float) -> float:
    """The length below which every change of the coefficients leaves a share of the answers.

    It is the largest such length for a share of 1, and a lower bound for others, since a change
    along one direction need not flip all images whose smallest changes are shorter.

    Args:
        distance: of each image, see `flips`; of all ranks.
        share: in (0, 1].

    Raises:
        UsageError: if there are no images.
    """
    if not len(distance):
        raise UsageError("no images to certify: the split is empty")
    may_flip = len(distance) - math.ceil(share * len(distance) - 1e-9)
    return float(distance.sort().values[may_flip])


@dataclass(frozen=True)
class Certificate:
    """What an edit may break on the images of a split, at some coefficients.

    Attributes:
        images: number of images, over all ranks.
        accuracy: there.
        ranges: by direction, by share, the range of lambda in which it stays.
        radii: by share, the radius of the coefficients.
    """

    images: int
    accuracy: float
    ranges: dict[str, dict[float, Plateau]]
    radii: dict[float, float]

    def facts(self) -> dict[str, Any]:
        """The certificate as JSON; infinite ends and radii are None."""
        ranges = {
            name: {f"{share:g}": plateau.ends() for share, plateau in each.items()}
            for name, each in self.ranges.items()
        }
        radii = {f"{s:g}": r if math.isfinite(r) else None for s, r in self.radii.items()}
        facts = {"images": self.images, "accuracy": self.accuracy}
        return {**facts, "ranges": ranges, "radii": radii}


def certify(
    logits: Logits,
    directions: Mapping[str, Sequence[float]],
    at: Sequence[float] | None = None,
    shares: Sequence[float] = SHARES,
) -> Certificate:
    """Certifies the answers of a linear model on a split, over all ranks.

    Args:
        logits: of this rank's share.
        directions: by name, one number a task vector.
        at: the coefficients to start from; None for theta0.
        shares: of the answers that stay, in (0, 1].

    Raises:
        UsageError: if answers do not follow from lines, see `line.affine`, or without images.
    """
    at = [0.0] * len(logits.vectors) if at is None else at
    found = flips(logits, at)
    own = found.distance, found.answers == logits.labels
    distance, right = (torch.cat(list(part)) for part in zip(*ddp.gather(own), strict=True))
    radii = {share: radius(distance, share) for share in shares}
    ranges = {}
    for name, direction in directions.items():
        parts = ddp.gather(intervals(logits, direction, at, found.answers))
        low, high = torch.cat([p.low for p in parts]), torch.cat([p.high for p in parts])
        ranges[name] = {share: certified(Intervals(low, high), share) for share in shares}
    return Certificate(len(distance), float(right.double().mean()), ranges, radii)
