"""Order statistics of weights that are read piece by piece; trimming and sign election of TIES."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, one_per_model
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float

Taus = Callable[[Piece], Iterable[Tensor]]
DIGIT = {"global": 16, "tensor": 11}  # bits; a histogram of 2**DIGIT for each threshold sought
WHOLE = ""  # the key of a threshold over the whole vector
KEY_BITS = 32  # of `ordered_keys`
TINY = 1e-8  # a sum of weights below this divides nothing
BLOCK = 2**18  # numbers of whole tensors that are merged at once; affects memory only


def ordered_keys(values: Float[Tensor, " weights"]) -> Tensor:
    """Integers from 0 in the order of signed numbers, which are rounded to float32."""
    bits = values.float().view(torch.int32).long()
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def key_value(key: int) -> float:
    """The number of a key of `ordered_keys`."""
    bits = key - 2**31 if key >= 2**31 else -1 - key
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _width(values: Tensor) -> int:
    """The number of bits of `values` that are ordered: those of magnitudes, or of keys."""
    return KEY_BITS if values.dtype == torch.int64 else values.itemsize * 8 - 1


@dataclass
class Selection:
    """The k-th smallest of a stream of magnitudes or keys, found digit by digit, not stored.

    Non-negative floating-point numbers are ordered like their bits.

    Attributes:
        rank: (number of magnitudes) -> k, from 1.
        prefix: the leading bits, as far as they are known.
        before: the number of magnitudes with smaller leading bits.
        counts: histogram of the next digit.
        number: the number of magnitudes; 0 until it is known.
    """

    rank: Callable[[int], int]
    dtype: torch.dtype = torch.float32
    prefix: int = 0
    before: int = 0
    counts: Tensor | None = None
    number: int = 0

    def count(self, values: Float[Tensor, " weights"], high: int, low: int) -> None:
        """Counts the digits from bit `low` to `high` of the magnitudes with the prefix."""
        self.dtype = values.dtype
        bits = values if values.dtype == torch.int64 else values.abs().view(self._integer)
        if high < _width(values):
            bits = bits[(bits >> high) == self.prefix]
        size = 1 << (high - low)
        counts = torch.bincount((bits >> low) & (size - 1), minlength=size)
        self.counts = counts if self.counts is None else self.counts + counts

    def settle(self, high: int, low: int) -> None:
        """Fixes the digit from its counts."""
        assert self.counts is not None, "count first"
        upto = self.counts.cumsum(0)
        self.number = self.number or int(upto[-1])
        digit = int(torch.searchsorted(upto, self.rank(self.number) - self.before))
        self.before += int(upto[digit - 1]) if digit else 0
        self.prefix = (self.prefix << (high - low)) | digit
        self.counts = None

    def value(self) -> float:
        """The magnitude, after all digits are fixed; of keys, the number itself."""
        if self.dtype == torch.int64:
            return key_value(self.prefix)
        return float(torch.tensor(self.prefix, dtype=self._integer).view(self.dtype))

    @property
    def _integer(self) -> torch.dtype:
        return torch.int64 if self.dtype == torch.float64 else torch.int32


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
    """The smallest magnitude that stays in each model, by tensor or, under `WHOLE`, overall."""
    return order_statistics(pieces, taus, [_rank(threshold, scope)], scope)


def order_statistics(
    pieces: Pieces, rows: Taus, ranks: Sequence[Callable[[int], int]], scope: str
) -> list[dict[str, float]]:
    """The k-th smallest number of each row, by tensor or, under `WHOLE`, overall.

    Args:
        pieces: starts a pass over the weights.
        rows: (piece) -> floating-point numbers, ordered by magnitude, or `ordered_keys`.
        ranks: (number of weights) -> k, from 1; that of row i is `ranks[i % len(ranks)]`.
        scope: "global" or "tensor".
    """
    searches: list[dict[str, Selection]] = []
    high: int | None = None
    width = None
    while high != 0:
        low = 0
        for piece in pieces():
            key = piece.name if scope == "tensor" else WHOLE
            for row, values in enumerate(rows(piece)):
                width = width or _width(values)
                if _width(values) != width:  # some float32, some float64
                    return order_statistics(pieces, _in_double(rows), ranks, scope)
                high = high or width
                low = max(0, high - DIGIT[scope])
                if row == len(searches):
                    searches.append({})
                selection = searches[row].setdefault(key, Selection(ranks[row % len(ranks)]))
                selection.count(values, high, low)
        if high is None:
            return []  # no weights at all
        for selections in searches:
            for selection in selections.values():
                selection.settle(high, low)
        high = low
    return [{key: s.value() for key, s in selections.items()} for selections in searches]


def _in_double(rows: Taus) -> Taus:
    return lambda piece: (values.double() for values in rows(piece))


@dataclass(frozen=True)
class Elected:
    """Statistics of the whole vectors: thresholds, and the sign to use where a sum is 0."""

    thresholds: list[dict[str, float]]
    zero_sign: float

    def trimmed(self, name: str, taus: Iterable[Tensor]) -> Float[Tensor, "models weights"]:
        """The task vectors with entries below the threshold set to 0."""
        rows = []
        for tau, least in zip(taus, self.thresholds, strict=True):
            bound = least[name] if name in least else least[WHOLE]
            rows.append(torch.where(tau.abs() >= bound, tau, torch.zeros_like(tau)))
        return torch.stack(rows)


def elect(
    pieces: Pieces,
    taus: Taus,
    *,
    threshold: float,
    scope: str,
    zero_sign: str,
    weights: float | Sequence[float] = 1.0,
    remove_keys: Collection[str] = (),
    **_others: Any,
) -> Elected:
    """The thresholds, from passes over the weights, and the majority sign if it is needed.

    Args:
        pieces: starts a pass over the weights.
        taus: the pieces of the task vectors, one per model, of a piece.
        threshold: share of the weights that stay: a percentage if above 1, else a fraction.
        scope: "global" or "tensor", the range of a threshold.
        zero_sign: "majority" or "positive", the sign where the sum is 0.
        weights: one for all task vectors, or one for each, which count in the sums.
        remove_keys: tensors to ignore.
        **_others: options of the method that are not used here.

    Raises:
        UsageError: if the threshold is out of range, or the number of weights is wrong.
    """
    if not 0 < threshold <= 100:
        raise UsageError(f"threshold must be above 0 and at most 100 (percent), got {threshold}")

    def kept() -> Iterator[Piece]:
        return (piece for piece in pieces() if piece.name not in remove_keys)

    thresholds = find_thresholds(kept, taus, threshold, scope)
    elected = Elected(thresholds, 1.0)
    if zero_sign == "positive":
        return elected
    signs = 0
    for piece in kept():
        factors = one_per_model(weights, piece.models, "weights")
        total = merge_rows(elected.trimmed(piece.name, taus(piece)), factors, "sum")
        signs += int(total.sign().sum(dtype=torch.int64))
    return Elected(thresholds, float((signs > 0) - (signs < 0)))


def merge_rows(
    rows: Float[Tensor, "models weights"],
    weights: Sequence[float],
    merge_func: str,
    zero_sign: float | None = None,
) -> Float[Tensor, " weights"]:
    r"""The weighted sum, mean or largest magnitude of task vectors, of one sign if one is elected.

    With \(v_t = w_t \tau_t\), the sign of a weight is that of \(\sum_t v_t\), and the \(v_t\) of
    another sign, or that are 0, are left out. The mean is \(\sum_t v_t / \sum_t w_t\) over those
    that stay, undivided where \(|\sum_t w_t|\) is below `TINY`.

    Args:
        rows: the task vectors.
        weights: w, one per task vector, of any sign.
        merge_func: "sum", "mean" or "max", the largest magnitude of the \(v_t\).
        zero_sign: the sign where the sum is 0; None to elect none.
    """
    factors = rows.new_tensor(weights)[:, None]
    weighted = rows * factors
    sign, agree = weighted.sum(dim=0).sign(), torch.ones_like(weighted, dtype=torch.bool)
    if zero_sign is not None:
        sign[sign == 0] = zero_sign
        agree = torch.where(sign > 0, weighted > 0, weighted < 0)
    weighted *= agree
    if merge_func == "max":
        return weighted.abs().amax(dim=0) * sign
    total = weighted.sum(dim=0)
    if merge_func == "mean":
        divisor = (factors * agree).sum(dim=0)
        total /= torch.where(divisor.abs() < TINY, 1.0, divisor)
    return total


def blocks(taus: Sequence[Float[Tensor, " weights"]]) -> Iterator[Float[Tensor, "models part"]]:
    """Whole task vectors, some weights of all at a time."""
    return map(torch.stack, zip(*(tau.split(BLOCK) for tau in taus), strict=True))


def merge_blocks(
    taus: Sequence[Float[Tensor, " weights"]],
    weights: Sequence[float],
    normalize: bool,
    elect_sign: bool,
) -> Float[Tensor, " weights"]:
    """The weighted sum, or mean if `normalize`, of whole tensors, see `merge_rows`.

    Args:
        taus: the task vectors.
        weights: one per task vector.
        normalize: divide by the sum of the weights of those that stay.
        elect_sign: elect a sign, plus where the sum is 0.
    """
    zero_sign = 1.0 if elect_sign else None
    merge_func = "mean" if normalize else "sum"
    return torch.cat([merge_rows(rows, weights, merge_func, zero_sign) for rows in blocks(taus)])
