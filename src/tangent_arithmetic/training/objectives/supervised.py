"""Cross-entropy, for one or several labels an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Setting
from tangent_arithmetic.training.recipe import Recipe

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

BISECTIONS = 60  # of an interval of a few hundred: to the precision of float64


class CrossEntropy(Objective):
    r"""\(-\sum_c q_c \log p_c\), \(q = (1 - \epsilon)\, \mathrm{onehot}(y) + \epsilon / C\).

    Args:
        label_smoothing: epsilon, in [0, 1].

    Source: Szegedy et al., "Rethinking the Inception Architecture", section 7, arXiv:1512.00567.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"]:
        """The loss of each image."""
        images, labels = batch
        return F.cross_entropy(
            model(images), labels, reduction="none", label_smoothing=self.label_smoothing
        )


class BinaryCrossEntropy(Objective):
    r"""\(-\frac1C \sum_c q_c \log p_c + (1 - q_c) \log(1 - p_c)\), \(p = \sigma(z + b)\).

    \(q_c = (1 - \epsilon)\, y_c + \epsilon / 2\) for label \(y_c \in \{0, 1\}\). The intercepts
    \(b\) are constants, so that the first batch has as many predicted labels of each class as true
    ones: a zero-shot head gives similarities, which are no log-odds. Neither average precision nor
    the order of images depends on them.

    Args:
        label_smoothing: epsilon, in [0, 1].

    Attributes:
        intercepts: b, shape (classes,); None before the first batch.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing
        self.intercepts: Tensor | None = None

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"]:
        """The loss of each image, the mean over the classes."""
        images, labels = batch
        logits = model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.intercepts is None:
            shares = ddp.gather((logits.detach().double().cpu(), labels.double().cpu()))
            self.intercepts = intercepts(*(torch.cat(parts) for parts in zip(*shares, strict=True)))
        targets = labels.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        logits = logits + self.intercepts.to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The intercepts."""
        return {} if self.intercepts is None else {"intercepts": self.intercepts}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Restores the intercepts."""
        self.intercepts = state.get("intercepts")
        return None


@torch.no_grad()
def intercepts(
    logits: Float64[Tensor, "images classes"], labels: Float64[Tensor, "images classes"]
) -> Float64[Tensor, " classes"]:
    r"""\(b\) with \(\sum_i \sigma(z_{ic} + b_c) = \sum_i y_{ic}\) for each class, by bisection.

    Half an image with and half an image without the label are added to the labels, since a class
    that none or all of the images have would need an infinite intercept.
    """
    rates = (labels.sum(dim=0) + 0.5) / (len(labels) + 1)
    low = rates.logit() - logits.amax(dim=0)
    high = rates.logit() - logits.amin(dim=0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (logits + middle).sigmoid().mean(dim=0) > rates
        low, high = low.where(above, middle), middle.where(above, high)
    return (low + high) / 2


def supervised_of(recipe: Recipe, multilabel: bool) -> Objective:
    """The objective that goes with labels: cross-entropy, binary for several an image."""
    return BinaryCrossEntropy(recipe.ls) if multilabel else CrossEntropy(recipe.ls)


@OBJECTIVES.register("supervised")
def supervised(setting: Setting) -> Objective:
    """Cross-entropy alone."""
    return supervised_of(setting.recipe, setting.multilabel)
