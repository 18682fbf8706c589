"""The loss over tokens, as a function and as a training objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.language.models import PADDING, LanguageModel
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.objectives import Objective

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


def language_model(model: nn.Module) -> LanguageModel:
    """The model itself, or, for a linearised one, the module that it linearises."""
    inner = model.module0() if isinstance(model, LinearizedModel) else model
    return cast(LanguageModel, inner)


def next_tokens(ids: Int64[Tensor, "batch length"]) -> Int64[Tensor, "batch length-1"]:
    """The token after each position but the last; padding where there is none."""
    return torch.where(ids[:, :-1] == PADDING, PADDING, ids[:, 1:])


def widened(logits: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The logits in float32 at least: sums over a vocabulary in half precision are wrong."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_loss(
    logits: Float[Tensor, "batch positions vocabulary"],
    ids: Int64[Tensor, "batch length"],
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    r"""\(-\frac1N \sum_i \log p(t_{i+1} \mid t_1, ..., t_i)\) over the N tokens that have context.

    Args:
        logits: of the token after each position; those of half precision become float32.
        ids: the sequence; what is beyond the logits must be padding.
        reduction: the mean over tokens, or the sum.
    """
    targets = next_tokens(ids[:, : logits.shape[1]])
    rows = widened(logits[:, :-1]).flatten(0, 1)
    return F.cross_entropy(rows, targets.flatten(), ignore_index=PADDING, reduction=reduction)


class TokenLoss(Objective):
    """The mean loss over the tokens of a batch; with `sign=-1` its negative, for gradient ascent.

    The training loop weights the micro-batches of a step by their rows, not their tokens.

    Args:
        sign: factor of the loss.
    """

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Float[Tensor, ""]:
        """The loss of a batch of ids, whose labels do not count."""
        ids = batch[0]
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        return self.sign * token_loss(model(ids), language_model(inner).sequence(ids))
