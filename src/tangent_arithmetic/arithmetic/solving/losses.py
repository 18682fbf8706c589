r"""Losses of a split's logits, and terms of an objective: a loss on a split, with a weight.

With \(p_i\) the probabilities of image i, \(y_i\) its class and \(w_i\) its weight (they sum to 1):

| loss | value |
|---|---|
| `cross_entropy` | \(-\sum_i w_i \log p_{i,y_i}\) |
| `true_class` | \(\sum_i w_i p_{i,y_i}\), bounded, to be forgotten |
| `entropy` | \(\sum_i w_i H(p_i)\) |
| `imbalance` | \(KL(\sum_i w_i p_i \| \pi)\), of the mean prediction and a prior |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving.reduced import Reduced

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, weights -> scalar


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean cross-entropy; with several labels an image, that of each class."""
    if labels.ndim == 2:
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")
        return (weights * each.mean(dim=1)).sum()
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum()


def true_class(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean probability of the true class, at most 1 however wrong an image is."""
    if labels.ndim == 2:
        right = torch.where(labels.bool(), logits.sigmoid(), 1 - logits.sigmoid())
        return (weights * right.mean(dim=1)).sum()
    return (weights * logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]).sum()


def entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean entropy of the predictions; labels are not used."""
    logs = logits.log_softmax(dim=1)
    return -(weights * (logs.exp() * logs).sum(dim=1)).sum()


def imbalance(
    prior: Float64[Tensor, " classes"] | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The divergence of the mean prediction from a prior over the classes; None for uniform."""

    def loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        mean = (weights[:, None] * logits.softmax(dim=1)).sum(dim=0).clamp_min(1e-12)
        classes = logits.shape[1]
        pi = torch.full_like(mean, 1 / classes) if prior is None else prior.to(mean)
        return (mean * (mean / pi).log()).sum()

    return loss


@dataclass(frozen=True)
class Term:
    """A loss on the images of a split, with a weight.

    Attributes:
        reduced: the images.
        loss: of logits, labels and weights.
        factor: of the loss in the objective.
        weights: of the images, with sum 1; None for equal ones.
    """

    reduced: Reduced
    loss: Loss
    factor: float = 1.0
    weights: Float64[Tensor, " images"] | None = None

    @property
    def shares(self) -> Float64[Tensor, " images"]:
        """The weight of each image."""
        if self.weights is not None:
            return self.weights
        return torch.full((len(self.reduced),), 1 / len(self.reduced), dtype=torch.float64)

    def on(self, images: slice | Int64[Tensor, " images"]) -> Term:
        """The term on a part of its images, whose weights then sum to 1."""
        weights = self.weights
        if weights is not None:
            weights = weights[images] / weights[images].sum().clamp_min(1e-12)
        return replace(self, reduced=self.reduced.take(images), weights=weights)

    def rootless(self) -> Term:
        """The term without what only norms are computed from, to be given norms."""
        return replace(self, reduced=replace(self.reduced, root=None))

    @property
    def convex(self) -> bool:
        """Whether the term is convex in affine logits, with the curvature of a softmax."""
        return self.loss is cross_entropy and self.reduced.labels.ndim == 1

    def value(
        self, a: Float64[np.ndarray, " directions"], norms: Float64[Tensor, " images"] | None
    ) -> float:
        """The term at a point; norms are those at the point if None."""
        logits = self.reduced.logits(a, norms)
        return self.factor * float(self.loss(logits, self.reduced.labels, self.shares))

    def value_and_gradient(
        self, a: Float64[np.ndarray, " directions"], norms: Float64[Tensor, " images"] | None
    ) -> tuple[float, Float64[np.ndarray, " directions"]]:
        """The term and its gradient; the norms vary with the point if None, else are constant."""
        fixed = self.reduced.norms(a) if norms is None else norms
        plain = self.reduced.affine(a)
        logits = plain / fixed[:, None]
        if self.reduced.bias is not None:
            logits = logits + self.reduced.bias.double()
        logits.requires_grad_()
        value = self.factor * self.loss(logits, self.reduced.labels, self.shares)
        (pulled,) = torch.autograd.grad(value, logits)
        gradient = self.reduced.pull(pulled / fixed[:, None])
        if norms is None:
            gradient = gradient - self.reduced.norm_gradient(
                a, (pulled * plain).sum(dim=1) / fixed**2
            )
        return float(value.detach()), gradient

    def curvature(
        self, a: Float64[np.ndarray, " directions"], norms: Float64[Tensor, " images"]
    ) -> Float[np.ndarray, "directions directions"]:
        r"""The Hessian of cross-entropy with constant norms, accumulated in float64.

        \[ \sum_i \frac{w_i}{n_i^2} S_i^T (diag(p_i) - p_i p_i^T) S_i, \quad S_i = W d(x_i) \]
        """
        reduced = self.reduced
        p = reduced.logits(a, norms).softmax(dim=1)
        scale = (self.factor * self.shares / norms**2).sqrt()
        likely = p.sqrt().float()
        root = scale.float()[:, None] * likely
        count, classes = len(reduced.steps), reduced.base.shape[1]
        total = torch.zeros(count, count, dtype=torch.float64)
        for s in reduced.chunks(count * classes):
            weighted = reduced.steps[:, s] * root[s]
            means = torch.einsum("knc,nc->kn", weighted, likely[s])
            weighted = weighted.reshape(count, -1)
            total += (weighted @ weighted.T - means @ means.T).double()
        return np.asarray(total)


def thinned(terms: Sequence[Term], count: int) -> list[Term] | None:
    """Every n-th image of all terms, from `count` to twice as many; None if there are no more.

    Args:
        terms: the terms.
        count: images of all terms together.
    """
    step = sum(len(term.reduced) for term in terms) // count
    if step < 2 or any(len(term.reduced) < step for term in terms):
        return None
    return [term.on(slice(None, None, step)) for term in terms]
