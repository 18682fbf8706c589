r"""Linear probes: classification heads fitted to the features of a frozen encoder.

\[ \min_{W, b}\; \frac1n \sum_i \ell(W x_i + b, y_i) + \frac{\lambda}{2} \|W\|^2, \quad
   x = (\phi - \mu) / s \]

with cross-entropy for classes, and one binary cross-entropy per class for several labels an image.
\(\mu\) is the mean of the features and \(s\) one scale for all of them; both are folded into the
head, which takes plain features. \(\lambda\) is the value of a grid with the smallest loss on
validation.

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes",
arXiv:1610.01644; the recipe of Radford et al., arXiv:2103.00020, appendix A.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int

# of lambda, strongest first: each solution is the start of the next
GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
ITERATIONS = 200  # of L-BFGS for each
MEMORY = 10
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Labelled:
    """Features with their labels.

    Attributes:
        features: of a frozen encoder.
        labels: a class each, or 0 and 1 for each class.
    """

    features: Float[Tensor, "images features"]
    labels: Int[Tensor, " images"] | Int[Tensor, "images classes"]


@dataclass(frozen=True)
class Probe:
    """A fitted head.

    Attributes:
        head: takes features as they are.
        regularisation: lambda.
        loss: on validation.
        accuracy: on validation, in [0, 1]: the share of images, or for several labels an image that
            of correct labels.
    """

    head: ClassificationHead
    regularisation: float
    loss: float
    accuracy: float


def fit(
    train: Labelled, val: Labelled, classnames: Sequence[str], grid: Sequence[float] = GRID
) -> Probe:
    """The probe with the smallest validation loss; the same inputs give the same head.

    Args:
        train: the images to fit.
        val: the images to choose the regularisation on.
        classnames: one phrase per class.
        grid: values of lambda, strongest first.

    Raises:
        UsageError: if features are not finite.
    """
    for part in (train, val):
        if not bool(part.features.isfinite().all()):
            raise UsageError(
                "the encoder's features are not finite, expected finite numbers to fit a linear "
                "probe to; try --precision=fp32, or other weights"
            )
    mean, scale = _moments(train.features)
    x, x_val = ((part.features.double() - mean) / scale for part in (train, val))
    weights = torch.zeros(len(classnames), x.shape[1] + 1, dtype=torch.float64, device=x.device)
    best: tuple[float, float, Tensor] | None = None
    for strength in grid:
        weights = _solve(weights, x, train.labels, strength)
        loss = float(_loss(weights, x_val, val.labels))
        if best is None or loss < best[0]:
            best = loss, strength, weights
    assert best is not None
    loss, strength, weights = best
    accuracy = _accuracy(_logits(weights, x_val), val.labels)
    matrix = weights[:, :-1] / scale
    bias = weights[:, -1] - matrix @ mean
    head = ClassificationHead(False, matrix.float().cpu(), bias.float().cpu(), classnames)
    return Probe(head, strength, loss, accuracy)


def _moments(features: Tensor) -> tuple[Float64[Tensor, " features"], Tensor]:
    """The mean of each feature, and the root mean square of all deviations; 1 if they are 0."""
    wide = features.double()
    mean = wide.mean(dim=0)
    scale = (wide - mean).square().mean().sqrt()
    return mean, scale if scale > 0 else torch.ones_like(scale)


def _logits(weights: Tensor, x: Tensor) -> Float64[Tensor, "images classes"]:
    return x @ weights[:, :-1].T + weights[:, -1]


def _loss(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over images; for several labels an image the sum over classes."""
    logits = _logits(weights, x)
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    losses = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    return losses.sum(dim=1).mean()


def _solve(start: Tensor, x: Tensor, labels: Tensor, strength: float) -> Tensor:
    """The minimum of the regularised loss by L-BFGS."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=ITERATIONS,
        history_size=MEMORY,
        tolerance_grad=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(weights, x, labels) + strength / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    hits = logits.argmax(dim=1) == labels if labels.ndim == 1 else (logits > 0) == labels.bool()
    return float(hits.double().mean())
