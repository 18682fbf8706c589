r"""Coefficients without labels: entropy and self-labels, with guards; and AdaMerging's rule.

Entropy alone has a trivial minimum: the same class for all images, with certainty. Guards:

- a box around the uniform coefficient, and a ridge towards it;
- a prior: the mean prediction of a split should be \(\pi\), uniform over the classes by default.

\[ \min_a \frac1T \sum_t \Big[ \frac1n \sum_i H(p_i(a)) + \beta\, KL(\bar p_t(a) \| \pi) \Big]
   + \frac{r}{K} \|a - c\|^2, \quad |a_k - c| \le \rho \]

Self-labels are the predictions at the current point, weighted by their confidence and balanced over
the classes; cross-entropy with them is minimised, and they are updated.

Source of the published rule: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task
Learning", arXiv:2310.02575.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy, entropy, imbalance
from tangent_arithmetic.arithmetic.solving.minibatches import StoredImages
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.solver import (
    Bounds,
    Objective,
    Solution,
    inside,
    minimum,
)
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float64

Rule = Literal["entropy", "selflabel"]
RULES: tuple[Rule, ...] = ("entropy", "selflabel")
PUBLISHED = 0.3  # AdaMerging's start, for every coefficient
STEPS, RATE, BATCH = 500, 1e-3, 16  # AdaMerging's: Adam steps, learning rate, images of a task


@dataclass(frozen=True)
class Guards:
    """What keeps a solution without labels from collapsing.

    Attributes:
        radius: largest distance of a coefficient from the uniform one.
        ridge: strength of the ridge towards it.
        balance: weight of the divergence from the prior over classes.
        confidence: self-labels of less confident images are not used.
        rounds: times that self-labels are updated.
        bounds: the least and the largest coefficient; None for none but 0.
    """

    radius: float = 0.5
    ridge: float = 0.1
    balance: float = 1.0
    confidence: float = 0.0
    rounds: int = 3
    bounds: Bounds | None = None

    def box(self, centre: Float64[np.ndarray, " directions"]) -> Bounds:
        """What both the radius around a uniform point within the bounds and these allow.

        Without bounds no coefficient is negative.
        """
        low, high = (0.0, np.inf) if self.bounds is None else self.bounds
        least, largest = centre.min() - self.radius, centre.max() + self.radius
        return np.maximum(low, least), np.minimum(high, largest)


def without_labels(
    rule: Rule,
    splits: Sequence[Reduced],
    centre: Float64[np.ndarray, " directions"],
    guards: Guards | None = None,
) -> Solution:
    """The solution of a rule on images whose labels are not used.

    Args:
        rule: "entropy" or "selflabel".
        splits: the images.
        centre: the uniform point, see `uniform_without_labels`.
        guards: what keeps it from collapsing.
    """
    guards = guards or Guards()
    centre = inside(centre, guards.bounds)
    if rule == "selflabel":
        return _self_labelled(splits, centre, guards)
    objective = Objective(unlabelled_terms(splits, guards.balance), centre, guards.ridge)
    a, slope, count = minimum(objective, centre, bounds=guards.box(centre))
    start, end = objective.value(centre), objective.value(a)
    if end >= start:
        a, end = centre, start
    return Solution(a, end, start, 0.0, slope, 1, count)


def uniform_without_labels(
    splits: Sequence[Reduced], coefs: Sequence[float], balance: float = 1.0
) -> float:
    """The coefficient for all directions with the lowest entropy and imbalance."""
    count = len(splits[0].steps)
    objective = Objective(unlabelled_terms(splits, balance), np.zeros(count))
    return min(coefs, key=lambda c: objective.value(np.full(count, c)))


def unlabelled_terms(splits: Sequence[Reduced], balance: float) -> list[Term]:
    """Entropy, and divergence from the prior, of each split."""
    for split in splits:
        check_one_answer(split)
    share = 1 / len(splits)
    terms = [Term(split, entropy, share) for split in splits]
    return terms + [Term(split, imbalance(), balance * share) for split in splits]


def check_one_answer(split: Reduced) -> None:
    """Checks that an image has one class, which the rules' softmax supposes.

    Raises:
        UsageError: if it has several.
    """
    if split.labels.ndim == 2:
        raise UsageError(
            f"{split.name} has several labels an image; rules without labels expect one class each"
        )


def _self_labelled(
    splits: Sequence[Reduced], centre: Float64[np.ndarray, " directions"], guards: Guards
) -> Solution:
    a, first, count = centre, None, 0
    for _ in range(max(1, guards.rounds)):
        terms = [self_labels(split, a, guards.confidence, 1 / len(splits)) for split in splits]
        objective = Objective(terms, centre, guards.ridge)
        first = objective.value(a) if first is None else first
        a, slope, evaluations = minimum(objective, a, bounds=guards.box(centre))
        count += evaluations
    return Solution(a, objective.value(a), float(first or 0), 0.0, slope, guards.rounds, count)


def self_labels(
    split: Reduced,
    a: Float64[np.ndarray, " directions"],
    confidence: float = 0.0,
    factor: float = 1.0,
) -> Term:
    """Cross-entropy with the predictions at a point.

    An image's weight is its confidence, divided by the total of its predicted class, so that each
    class that is predicted has the same weight.

    Args:
        split: the images; their labels are not used.
        a: the point.
        confidence: less confident images have no weight, unless all are.
        factor: of the term.
    """
    check_one_answer(split)
    best, labels = split.logits(a).softmax(dim=1).max(dim=1)
    weights = best * (best >= confidence) if bool((best >= confidence).any()) else best
    totals = torch.zeros(split.base.shape[1], dtype=torch.float64).index_add(0, labels, weights)
    weights = weights / totals[labels].clamp_min(1e-12)
    return Term(replace(split, labels=labels), cross_entropy, factor, weights / weights.sum())


def adamerging(
    splits: Sequence[Reduced],
    start: float = PUBLISHED,
    steps: int = STEPS,
    rate: float = RATE,
    batch: int = BATCH,
    seed: int = 0,
) -> Float64[np.ndarray, " directions"]:
    """The published rule: Adam on the entropy of a batch of each task, clipped to [0, 1].

    Args:
        splits: the images; their labels are not used.
        start: every coefficient's first value.
        steps: of Adam.
        rate: learning rate.
        batch: images of each task in a step.
        seed: of the batches.
    """
    images, counts = StoredImages(splits), [len(split) for split in splits]
    a = torch.full((images.directions,), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a], lr=rate, betas=(0.9, 0.999))
    generator = np.random.default_rng([seed, 31])
    for _ in range(steps):
        optimizer.zero_grad()
        draw = (generator.choice(n, min(batch, n), replace=False) for n in counts)
        chosen = {split: torch.from_numpy(own) for split, own in enumerate(draw)}
        loss = torch.zeros((), dtype=torch.float64)
        for split, logits in images.logits(a.clamp(0, 1), chosen).items():
            shares = torch.full((len(logits),), 1 / len(logits), dtype=torch.float64)
            loss = loss + entropy(logits, images.labels[split][chosen[split]], shares)
        loss.backward()
        optimizer.step()
    return np.asarray(a.detach().clamp(0, 1))
