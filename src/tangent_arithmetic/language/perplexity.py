r"""Perplexity, and its sweep over all coefficients of a task vector.

A linear model has the logits \(f_0 + a\,d\) at the coefficient \(a\), at every position, so that
one pass gives \(f_0\) and \(d\), and with them every coefficient. A standard model is moved and
run once a coefficient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.language.losses import language_model, next_tokens, token_loss, widened
from tangent_arithmetic.language.models import PADDING, LanguageModel
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.statedict import State, move_into
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.copies import copy_to_move
from tangent_arithmetic.tangent.linearized import LinearizedModel

if TYPE_CHECKING:
    from jaxtyping import Float, Float64, Int64

POSITIONS = 64  # whose logits are combined at once: 13 MB each for the vocabulary of GPT-2


@torch.no_grad()
def mean_loss(
    model: LanguageModel | LinearizedModel, ids: Int64[Tensor, "rows ..."], batch_size: int = 1
) -> float:
    """The mean loss over all tokens, in nats.

    Args:
        model: standard or linear.
        ids: rows such as `tokens.blocks`.
        batch_size: rows of a pass.
    """
    total, sequence = 0.0, language_model(model).sequence
    for batch in _batches(model, ids, batch_size, "perplexity"):
        total += float(token_loss(model(batch), sequence(batch), "sum"))
    return total / _count(sequence(ids))


def perplexity(
    model: LanguageModel | LinearizedModel, ids: Int64[Tensor, "rows ..."], batch_size: int = 1
) -> float:
    """The exponential of `mean_loss`; infinite if float64 cannot hold it."""
    return exponential(mean_loss(model, ids, batch_size))


def exponential(loss: float) -> float:
    """The perplexity of a mean loss."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def sweep(
    model: LanguageModel | LinearizedModel,
    tau: State,
    ids: Int64[Tensor, "rows ..."],
    coefs: Sequence[float],
    batch_size: int = 1,
) -> dict[float, float]:
    """The mean loss at theta0 + a tau for each coefficient a.

    Args:
        model: a linear model, of which one pass is made, or a standard one, which is copied.
        tau: the task vector.
        ids: rows such as `tokens.blocks`.
        coefs: the coefficients.
        batch_size: rows of a pass.
    """
    if isinstance(model, LinearizedModel):
        return linear_sweep(model, tau, ids, coefs, batch_size)
    moved = copy_to_move(model)
    target, theta = dict(moved.named_parameters()), dict(model.named_parameters())
    losses = {}
    for coef in coefs:
        move_into(target, theta, tau, coef)
        empty_caches(moved)
        losses[coef] = mean_loss(moved, ids, batch_size)
    return losses


@torch.no_grad()
def linear_sweep(
    model: LinearizedModel,
    tau: State,
    ids: Int64[Tensor, "rows ..."],
    coefs: Sequence[float],
    batch_size: int = 1,
    positions: int = POSITIONS,
) -> dict[float, float]:
    """`sweep` of a linear model in one pass over the rows.

    Args:
        model: expanded at theta0; its theta does not count.
        tau: the task vector.
        ids: rows such as `tokens.blocks`.
        coefs: the coefficients.
        batch_size: rows of a pass.
        positions: whose logits are combined at once.
    """
    totals, sequence = torch.zeros(len(coefs), dtype=torch.float64), language_model(model).sequence
    for batch in _batches(model, ids, batch_size, "perplexity at all coefficients"):
        f0, (step,) = model.tangents(batch, [tau])
        totals += _losses(f0, step, sequence(batch), coefs, positions)
    means = (totals / _count(sequence(ids))).tolist()
    return dict(zip(coefs, means, strict=True))


def _losses(
    f0: Float[Tensor, "batch positions vocabulary"],
    step: Float[Tensor, "batch positions vocabulary"],
    ids: Int64[Tensor, "batch length"],
    coefs: Sequence[float],
    positions: int,
) -> Float64[Tensor, " coefs"]:
    """The sum of the losses of a batch at each coefficient."""
    targets = next_tokens(ids[:, : f0.shape[1]]).flatten()
    rows = (targets != PADDING).nonzero().squeeze(1)
    base, along = f0[:, :-1].flatten(0, 1), step[:, :-1].flatten(0, 1)
    totals = torch.zeros(len(coefs), dtype=torch.float64)
    for some in rows.split(positions):
        at, ahead, truth = widened(base[some]), widened(along[some]), targets[some]
        sums = [
            F.cross_entropy(torch.add(at, ahead, alpha=coef), truth, reduction="sum")
            for coef in coefs
        ]
        totals += torch.stack(sums).double().cpu()
    return totals


def _count(ids: Int64[Tensor, "rows length"]) -> int:
    """The number of tokens that have a context.

    Raises:
        UsageError: if there are none.
    """
    count = int((next_tokens(ids) != PADDING).sum())
    if not count:
        raise UsageError("expected rows of two tokens or more, got none")
    return count


def _batches(
    model: nn.Module, ids: Int64[Tensor, "rows ..."], size: int, what: str
) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for batch in progress(ids.split(size), what):
        yield batch.to(device)
