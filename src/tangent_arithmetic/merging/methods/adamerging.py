r"""AdaMerging: coefficients that make the merged model certain of unlabelled images.

\(\theta(\alpha) = \theta_0 + \sum_k \alpha_{g,k} \tau_k\), with a coefficient for each task, or for
each task and group g of weights, minimises the sum over tasks of the mean entropy of its
predictions, by Adam on batches of each task. One forward and one backward pass of the merged
network gives the derivatives in all coefficients,

\[ \partial L / \partial \alpha_{g,k} = \langle \nabla_g L, \tau_{k,g} \rangle, \]

with task vectors read tensor by tensor from the models' files, twice a step: memory is that of one
model with its gradient and activations, whatever the number of tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving.losses import entropy
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.examples import Examples, Part, batches_of, check_count
from tangent_arithmetic.merging.moving import MovingEncoder
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of task vectors by group of weights.

    Attributes:
        group_of: the group of each tensor.
        values: of each group: a coefficient for each model.
    """

    group_of: Mapping[str, str]
    values: Mapping[str, list[float]]

    def of(self, name: str) -> list[float]:
        """The coefficients of a tensor, one a model."""
        return self.values[self.group_of[name]]


def mean_entropy(logits: Float[Tensor, "batch classes"], several: bool) -> Tensor:
    """The mean entropy of predictions; of several labels an image, the mean over the classes."""
    if several:  # the cross-entropy of probabilities with themselves
        p = logits.sigmoid()
        return (p * F.softplus(-logits) + (1 - p) * F.softplus(logits)).mean()
    shares = torch.full((len(logits),), 1 / len(logits), dtype=logits.dtype, device=logits.device)
    return entropy(logits, shares, shares)


def backward(encoder: ModuleEncoder, split: Split, images: Tensor, several: bool) -> float:
    """Adds the gradient of the mean entropy on some images; returns the entropy."""
    compute = split.compute or Compute.of(encoder.weights())
    with torch.enable_grad(), compute.autocast():
        features = encoder(images.to(compute.device))
        logits = split.head.to(compute.device)(features)
    loss = mean_entropy(logits if logits.dtype == torch.float64 else logits.float(), several)
    loss.backward()
    return float(loss.detach())


def prepare(
    examples: Examples,
    *,
    grouping: str = "task",
    init_values: float,
    lr: float,
    max_steps: int,
    batch_size: int,
    clamp_weights: bool,
    split: Part,
    seed: int,
) -> Coefficients:
    """The coefficients after the last step."""
    check_count("AdaMerging", "batch_size", batch_size)
    if max_steps < 0 or not lr > 0:
        raise UsageError(
            f"AdaMerging's max_steps must be at least 0 and its lr above 0, got {max_steps} and "
            f"{lr}"
        )
    moving = MovingEncoder(examples, grouping)
    encoder = moving.encoder
    encoder.requires_grad_()
    splits = [examples.split(encoder, model, part=split) for model in examples.models]
    pictures = {each.name: batches_of(each).pictures for each in splits}
    several = [getattr(own[0][1], "ndim", 0) > 0 for own in pictures.values()]
    first = batches_of(splits[0])
    images = Unlabelled(pictures, first.transform, batch_size, False, seed, first.num_workers)
    alpha = torch.full((len(moving.groups), len(splits)), init_values, dtype=torch.float64)
    optimizer = torch.optim.Adam([alpha], lr=lr)
    entropies = []
    with closing(images):
        for step in progress(range(max_steps), f"entropy of {split} images", max_steps):
            moving.place(alpha)
            draws = (images.batch(step * len(splits) + k) for k in range(len(splits)))
            losses = map(backward, [encoder] * len(splits), splits, draws, several)
            entropies.append(sum(losses) / len(splits))
            alpha.grad = moving.gradient()
            optimizer.step()
            if clamp_weights:
                alpha.clamp_(0, 1)
    found = Coefficients(moving.group_of, dict(zip(moving.groups, alpha.tolist(), strict=True)))
    _report(examples, alpha, entropies, split)
    return found


def _report(examples: Examples, alpha: Tensor, entropies: list[float], split: Part) -> None:
    means = zip(examples.models, alpha.mean(0).tolist(), strict=True)
    logger.info(
        "coefficients (means): %s", ", ".join(f"{model} {coef:.3f}" for model, coef in means)
    )
    if entropies:
        window = max(1, len(entropies) // 10)
        start, end = sum(entropies[:window]) / window, sum(entropies[-window:]) / window
        logger.info("mean entropy on unlabelled %s images: %.3f -> %.3f", split, start, end)


def moved(piece: Piece, coefficients: Coefficients) -> Tensor:
    """The piece at theta0 + sum of alpha tau; at theta0 if the encoder has no such tensor."""
    total = piece.base.clone()
    if piece.name in coefficients.group_of:
        for tau, coef in zip(piece.taus(), coefficients.of(piece.name), strict=True):
            total.add_(tau, alpha=coef)
    return total


@merging_method(
    "task_wise_adamerging",
    source="arXiv:2310.02575",
    algorithm="CLIPTaskWiseAdaMergingAlgorithm",
    prepare=prepare,
    passes=2,
    needs_data=True,
)
def task_wise_adamerging(
    piece: Piece,
    *,
    init_values: float = 0.3,
    lr: float = 1e-3,
    max_steps: int = 1000,
    batch_size: int = 16,
    clamp_weights: bool = True,
    split: Literal["validation", "test"] = "validation",
    seed: int = 0,
    statistics: Coefficients,
) -> Tensor:
    r"""\(\theta_0 + \sum_k \alpha_k \tau_k\) of least entropy, with a coefficient for each task.

    Args:
        piece: one piece of every model.
        init_values: every coefficient's first value.
        lr: Adam's learning rate, at most the change of a coefficient in a step.
        max_steps: number of steps.
        batch_size: images of each task in a step.
        clamp_weights: keep coefficients in [0, 1], after each step.
        split: where the unlabelled images are from; the published results use the test images that
            they are measured on.
        seed: of the batches.
        statistics: the result of `prepare`.

    Source: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
    arXiv:2310.02575, section 3.2; the names of options and their defaults are fusion-bench's,
    where `clamp_weights` is false.
    """
    return moved(piece, statistics)


@merging_method(
    "layer_wise_adamerging",
    source="arXiv:2310.02575",
    algorithm="CLIPLayerWiseAdaMergingAlgorithm",
    config="adamerging/clip",
    prepare=prepare,
    passes=2,
    needs_data=True,
)
def layer_wise_adamerging(
    piece: Piece,
    *,
    init_values: float = 0.3,
    lr: float = 1e-3,
    max_steps: int = 1000,
    batch_size: int = 16,
    clamp_weights: bool = True,
    split: Literal["validation", "test"] = "validation",
    grouping: Literal["block", "task-layer"] = "block",
    seed: int = 0,
    statistics: Coefficients,
) -> Tensor:
    r"""\(\theta_0 + \sum_k \alpha_{g,k} \tau_k\) of least entropy, for each task and layer g.

    Args:
        piece: one piece of every model.
        init_values: every coefficient's first value.
        lr: Adam's learning rate.
        max_steps: number of steps.
        batch_size: images of each task in a step.
        clamp_weights: keep coefficients in [0, 1].
        split: where the unlabelled images are from.
        grouping: a layer is a parameter tensor (`block`), as in the authors' code and fusion-bench,
            or the embedding, a block or the head (`task-layer`), see `arithmetic.solving.groups`.
        seed: of the batches.
        statistics: the result of `prepare`.

    Source: as `task_wise_adamerging`.
    """
    return moved(piece, statistics)
