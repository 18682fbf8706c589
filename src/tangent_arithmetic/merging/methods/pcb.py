r"""PCB-merging: each weight of a task vector counts by its size and its agreement with the others.

All quantiles are over whole vectors, as in the authors' code, and exact: they are found digit by
digit in passes over the weights. Those of signed numbers are rounded to float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.merging.trimming import WHOLE, order_statistics, ordered_keys
from tangent_arithmetic.runtime.errors import UsageError

TAIL = 1e-4  # share of the smallest, and of the largest magnitudes that are clamped
LEAST = 1e-12  # smallest sum of the weights' parameters that is divided by


def normalized(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Numbers clamped to a range and mapped to [0, 1], row by row; 0 where the range is empty."""
    width = high - low
    return (values.clamp(low, high) - low) / torch.where(width > 0, width, 1.0)


@dataclass(frozen=True)
class Balance:
    """Bounds of each model: of the magnitudes, and of the balancing parameters before scaling.

    Attributes:
        low: magnitudes below are raised to it.
        high: magnitudes above are lowered to it.
        least: parameters below count as 0.
        most: the largest parameter, which counts as 1.
    """

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor

    def raw(self, taus: Tensor) -> Tensor:
        """Intra-balancing times inter-balancing of task vectors, shape (models, weights)."""
        low, high = (bound.to(taus)[:, None] for bound in (self.low, self.high))
        intra = normalized(taus.abs(), low, high).square_().mul_(len(taus)).exp_()
        return intra * torch.tanh(taus * taus.sum(dim=0))

    def merged(self, taus: Tensor) -> Tensor:
        """The task vectors, merged by their balancing parameters."""
        low, high, least, most = (
            bound.to(taus)[:, None] for bound in (self.low, self.high, self.least, self.most)
        )
        beta = normalized(self.raw(taus), least, most)
        clamped = taus.sign() * taus.abs().clamp(low, high)
        return (clamped * beta).sum(dim=0) / beta.sum(dim=0).clamp(min=LEAST)


def prepare(pieces: Pieces, *, pcb_ratio: float, **_options: Any) -> Balance:
    """The bounds of all models, from passes over the weights.

    Raises:
        UsageError: if `pcb_ratio` is out of range.
    """
    if not 0 < pcb_ratio <= 1:
        raise UsageError(f"pcb_merging's pcb_ratio must be above 0 and at most 1, got {pcb_ratio}")

    def twice(piece: Piece) -> Iterator[Tensor]:
        for tau in piece.taus():
            yield from (tau, tau)

    tails = [lambda n: int(TAIL * n) + 1, lambda n: max(1, int((1 - TAIL) * n))]
    sizes = _bounds(order_statistics(pieces, twice, tails, "global"))
    balance = Balance(sizes[0::2], sizes[1::2], sizes[0::2], sizes[1::2])

    def keys(piece: Piece) -> Iterator[Tensor]:
        for row in ordered_keys(balance.raw(torch.stack(tuple(piece.taus())))):
            yield from (row, row)

    top = [lambda n: min(n, int((1 - pcb_ratio) * n) + 1), lambda n: n]
    parameters = _bounds(order_statistics(pieces, keys, top, "global"))
    return Balance(sizes[0::2], sizes[1::2], parameters[0::2], parameters[1::2])


def _bounds(statistics: list[dict[str, float]]) -> Tensor:
    return torch.tensor([row[WHOLE] for row in statistics], dtype=torch.float64)


@merging_method("pcb_merging", source="arXiv:2410.02396", prepare=prepare, passes=5)
def pcb_merging(
    piece: Piece, *, scaling_factor: float = 1.2, pcb_ratio: float = 0.1, statistics: Balance
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda \sum_t \beta_t \odot \tau_t \,/\, \sum_t \beta_t\).

    \(\beta_t\) is \(\exp(T\, \overline{|\tau_t|}^2) \odot \tanh(\tau_t \odot \sum_s \tau_s)\) with
    all but its largest values set to the smallest of these, mapped to [0, 1]; the bar maps the
    magnitudes of a task vector to [0, 1]. Magnitudes beyond their quantiles 0.0001 and 0.9999 are
    moved there, in the merged vectors too. All this is as in the authors' code; the paper's
    formulas have softmax functions in place of exp and tanh.

    Args:
        piece: one piece of every model.
        scaling_factor: lambda.
        pcb_ratio: share of the weights of a task vector that count.
        statistics: the result of `prepare`.

    Source: Du et al., "Parameter Competition Balancing for Model Merging", arXiv:2410.02396.
    """
    merged = statistics.merged(torch.stack(tuple(piece.taus())))
    return merged.mul_(scaling_factor).add_(piece.base)
