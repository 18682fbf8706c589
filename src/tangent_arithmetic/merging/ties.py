r"""TIES: task vectors are trimmed, elect a sign for each weight, and those that agree are merged.

Definitions differ between implementations, and both are here:

==================  =================================  ==========================================
option              as the paper's code, fusion-bench  as mergekit
==================  =================================  ==========================================
scope               "global": the threshold is over    "tensor": the largest int(K n), at least
                    the whole vector, the largest      one, of each tensor of n weights
                    int(K d) + 1 of d weights stay
zero_sign           "majority": where the sum is 0,    "positive"
                    the sign that most weights have
merge_func          "sum", "mean" or "max"             "mean" (its `normalize`) or "sum"
==================  =================================  ==========================================

Equal magnitudes at the threshold all stay; mergekit keeps some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.runtime.errors import UsageError

Taus = Callable[[Piece], Iterable[Tensor]]
DIGIT = {"global": 16, "tensor": 11}  # bits; a histogram of 2**DIGIT for each threshold sought
WHOLE = ""  # the key of a threshold over the whole vector


@dataclass
class Selection:
    """The k-th smallest of a stream of magnitudes, found digit by digit without keeping them.

    The bits of non-negative floating-point numbers are ordered as the numbers are.

    Attributes:
        rank: (how many there are) -> k, from 1.
        prefix: the leading bits found so far.
        before: how many magnitudes have smaller leading bits.
    """

    rank: Callable[[int], int]
    dtype: torch.dtype | None = None
    prefix: int = 0
    before: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    number: int = 0

    @staticmethod
    def bits(values: Tensor) -> Tensor:
        """The bits of magnitudes, as integers."""
        return values.abs().view(torch.int64 if values.dtype == torch.float64 else torch.int32)

    def count(self, values: Tensor, high: int, low: int) -> None:
        """Counts the digits from bit `low` to bit `high` of those with the known leading bits."""
        bits = self.bits(values)
        self.dtype = values.dtype
        if high < (63 if bits.dtype == torch.int64 else 31):
            bits = bits[(bits >> high) == self.prefix]
        digits = (bits >> low) & ((1 << (high - low)) - 1)
        size = 1 << (high - low)
        found = torch.bincount(digits, minlength=size)
        self.counts = found if not len(self.counts) else self.counts + found

    def settle(self, high: int, low: int) -> None:
        """Fixes the digit that was counted."""
        if not self.number:
            self.number = int(self.counts.sum())
        wanted = self.rank(self.number) - self.before
        upto = self.counts.cumsum(0)
        digit = int(torch.searchsorted(upto, wanted))
        self.before += int(upto[digit - 1]) if digit else 0
        self.prefix = (self.prefix << (high - low)) | digit
        self.counts = torch.zeros(0, dtype=torch.int64)

    def value(self) -> float:
        """The magnitude, once all digits are fixed."""
        integer = torch.int64 if self.dtype == torch.float64 else torch.int32
        return float(torch.tensor(self.prefix, dtype=integer).view(self.dtype or torch.float32))


def _rank(threshold: float, scope: str) -> Callable[[int], int]:
    share = threshold / 100 if threshold > 1 else threshold

    def rank(number: int) -> int:
        if scope == "tensor":
            return number - max(1, int(share * number)) + 1
        return max(1, number - int(share * number))

    return rank


def find_thresholds(
    pieces: Pieces, taus: Taus, threshold: float, scope: str
) -> list[dict[str, float]]:
    """For each model the least magnitude that stays, by tensor or, under `WHOLE`, for all."""
    found: list[dict[str, Selection]] = []
    high: int | None = None
    while high != 0:
        low = 0
        for piece in pieces():
            key = piece.name if scope == "tensor" else WHOLE
            for model, tau in enumerate(taus(piece)):
                if high is None:
                    high = 63 if tau.dtype == torch.float64 else 31
                low = max(0, high - DIGIT[scope])
                if model == len(found):
                    found.append({})
                if key not in found[model]:
                    found[model][key] = Selection(_rank(threshold, scope))
                found[model][key].count(tau, high, low)
        if high is None:
            return []  # no weights at all
        for selections in found:
            for selection in selections.values():
                selection.settle(high, low)
        high = low
    return [{key: s.value() for key, s in selections.items()} for selections in found]


@dataclass(frozen=True)
class Elected:
    """What TIES knows of the whole vectors: thresholds, and the sign that stands for 0."""

    thresholds: list[dict[str, float]]
    zero_sign: float

    def trimmed(self, name: str, taus: Iterable[Tensor]) -> Tensor:
        """The task vectors with what is below the threshold at 0, shape (models, weights)."""
        rows = []
        for tau, least in zip(taus, self.thresholds, strict=True):
            bound = least[name] if name in least else least[WHOLE]
            rows.append(torch.where(tau.abs() >= bound, tau, torch.zeros_like(tau)))
        return torch.stack(rows)


def elect(pieces: Pieces, taus: Taus, threshold: float, scope: str, zero_sign: str) -> Elected:
    """Goes over the weights for the thresholds and, if need be, for the sign of the majority.

    Raises:
        UsageError: for options that TIES does not have.
    """
    if not 0 < threshold <= 100:
        raise UsageError(f"threshold must be above 0 and at most 100 (percent), got {threshold}")
    if scope not in DIGIT:
        raise UsageError(f"unknown scope {scope!r}; choose from global, tensor")
    if zero_sign not in ("majority", "positive"):
        raise UsageError(f"unknown zero_sign {zero_sign!r}; choose from majority, positive")
    found = Elected(find_thresholds(pieces, taus, threshold, scope), 1.0)
    if zero_sign == "positive":
        return found
    signs = 0
    for piece in pieces():
        signs += int(
            found.trimmed(piece.name, taus(piece)).sum(dim=0).sign().sum(dtype=torch.int64)
        )
    return Elected(found.thresholds, float((signs > 0) - (signs < 0)))


def merge_agreeing(trimmed: Tensor, zero_sign: float, merge_func: str) -> Tensor:
    """The sum, mean or greatest magnitude of those entries whose sign is that of their sum.

    Args:
        trimmed: shape (models, weights).
        zero_sign: the sign where the sum is 0.
        merge_func: "sum", "mean" or "max".
    """
    sign = trimmed.sum(dim=0).sign()
    sign[sign == 0] = zero_sign
    agreeing = trimmed * torch.where(sign > 0, trimmed > 0, trimmed < 0)
    if merge_func == "max":
        return agreeing.abs().amax(dim=0) * sign
    total = agreeing.sum(dim=0)
    if merge_func == "mean":
        total /= (agreeing != 0).sum(dim=0).clamp(min=1)
    elif merge_func != "sum":
        raise UsageError(f"unknown merge_func {merge_func!r}; choose from sum, mean, max")
    return total


def kept(pieces: Pieces, remove_keys: Sequence[str]) -> Pieces:
    """The pieces without those of some tensors."""

    def rest() -> Iterator[Piece]:
        return (piece for piece in pieces() if piece.name not in remove_keys)

    return rest


def prepare(
    pieces: Pieces,
    *,
    threshold: float,
    scope: str,
    zero_sign: str,
    remove_keys: Sequence[str],
    **_options: Any,
) -> Elected:
    """Thresholds and sign for `ties`."""
    return elect(kept(pieces, remove_keys), Piece.taus, threshold, scope, zero_sign)


@merging_method("ties", source="arXiv:2306.01708", prepare=prepare, passes=5, drops=True)
def ties(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    threshold: float = 20,
    remove_keys: Sequence[str] = (),
    merge_func: Literal["sum", "mean", "max"] = "sum",
    scope: Literal["global", "tensor"] = "global",
    zero_sign: Literal["majority", "positive"] = "majority",
    statistics: Elected,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda\, m\), where m merges the \(\hat\tau_t\) of sign \(\gamma\).

    \(\hat\tau_t\) is the task vector with all but its largest magnitudes at 0, \(\gamma\) the sign
    of \(\sum_t \hat\tau_t\), weight by weight.

    Args:
        piece: what to merge.
        scaling_factor: lambda.
        threshold: how many of the weights stay, in percent if above 1, else as a share.
        remove_keys: tensors that are left as in the pre-trained model.
        merge_func: what becomes of the agreeing ones.
        scope: over what the largest are sought, see above.
        zero_sign: the sign where the sum is 0, see above.
        statistics: of `prepare`.

    Source: Yadav et al., "TIES-Merging", arXiv:2306.01708, section 4.
    """
    if piece.name in remove_keys:
        return piece.base.clone()
    trimmed = statistics.trimmed(piece.name, piece.taus())
    merged = merge_agreeing(trimmed, statistics.zero_sign, merge_func)
    return merged.mul_(scaling_factor).add_(piece.base)
