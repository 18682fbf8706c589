r"""Factors of several data sets as one, in as much memory as those of one.

The sum of \(w_t G_t\) is written in common bases: leading eigenvectors of the summed row and column
moments. A data set's moments become \((P'^\top P_t)^2\, \Lambda_t\, (R_t^\top R')^2\) (squares of
entries), the diagonal of its factor there; traces are kept exactly. A negative weight takes a data
set out again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.factors.bases import compress, leading
from tangent_arithmetic.training.factors.blocks import Block
from tangent_arithmetic.training.factors.factor import Factor
from tangent_arithmetic.training.factors.whole import CORNER, Factors


def merge(
    parts: Sequence[Factors],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    directions: int | None = None,
) -> Factors:
    """The factors of the weighted sum.

    Args:
        parts: factors of the same model.
        weights: one each, negative to remove; equal ones with sum 1 if None.
        rank: of the common bases; None for the largest of the parts'.
        directions: of all layers; None for as many as the part with most.

    Raises:
        UsageError: if they are of different models, or kinds.
    """
    if not parts:
        raise ValueError("expected factors to merge, got none")
    weights = [1 / len(parts)] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts):
        raise ValueError(f"expected {len(parts)} weights, got {len(weights)}")
    _check(parts)
    first = parts[0]
    if len(parts) == 1 and weights == [1.0]:
        return first
    factors, rows = dict[str, Factor](), dict[str, Tensor]()
    signs = _signs(parts, weights)
    for block in first.blocks:
        name, new = block.name, _bases(parts, weights, block, rank)
        moved = None
        if name in first.directions:
            moved = torch.cat([_moved(p, w, name, new) for p, w in _pairs(parts, weights)])
            rows[name] = moved[:, :CORNER, :CORNER]
        factors[name] = _summed(parts, weights, block, new, moved, signs)
    most = max((len(next(iter(p.directions.values()), ())) for p in parts), default=0)
    kept = dict[str, Tensor]()
    if rows:
        flat = [value.flatten(1) for value in rows.values()]
        for name, value in zip(
            rows, compress(flat, signs, most if directions is None else directions), strict=True
        ):
            kept[name] = value.reshape(-1, *rows[name].shape[1:])
    info = {"merged": [dict(p.info) for p in parts]}
    return Factors(first.blocks, factors, kept, first.shrinkage, info)


def _pairs(parts: Sequence[Factors], weights: Sequence[float]) -> list[tuple[Factors, float]]:
    return list(zip(parts, weights, strict=True))


def _check(parts: Sequence[Factors]) -> None:
    first = parts[0]
    for part in parts[1:]:
        same = first.blocks == part.blocks and first.directions.keys() == part.directions.keys()
        forms = [
            {name: factor.left is None for name, factor in p.factors.items()} for p in (first, part)
        ]
        if not same or forms[0] != forms[1]:
            raise UsageError(
                "expected factors of the same model and kind, got different ones; collect them "
                "again with the same --factors and --factor-directions"
            )


def _bases(
    parts: Sequence[Factors], weights: Sequence[float], block: Block, rank: int | None
) -> Factor:
    """Common bases of a block, with moments still to be summed."""
    old = [part.factors[block.name] for part in parts]
    zero = old[0].rest.new_zeros(())
    if any(factor.left is None for factor in old):
        return Factor(old[0].moments.new_zeros(()), zero)
    sides = []
    for side in (0, 1):
        total = sum(
            (w * _second_moment(f, side, block.shape) for f, w in zip(old, weights, strict=True)),
            torch.zeros((), device=zero.device),
        )
        most = max(f.moments.shape[side] for f in old) if rank is None else rank
        sides.append(leading(total, most))
    return Factor(zero, zero, sides[0], sides[1])


def _second_moment(factor: Factor, side: int, shape: tuple[int, int]) -> Tensor:
    """E[G_n G_n^T] for side 0, E[G_n^T G_n] for side 1, as far as a factor knows it."""
    basis = factor.left if side == 0 else factor.right
    assert basis is not None
    outside = shape[1 - side] - factor.moments.shape[1 - side]
    inside = factor.moments.sum(1 - side) + factor.rest * outside
    flat = factor.rest * shape[1 - side]
    dense = (basis * (inside - flat)) @ basis.mT
    dense.diagonal().add_(flat)
    return dense


def _overlaps(old: Factor, new: Factor) -> tuple[Tensor, Tensor]:
    """P'^T P and R^T R'."""
    assert old.left is not None and old.right is not None
    assert new.left is not None and new.right is not None
    return new.left.mT @ old.left, old.right.mT @ new.right


def _moved(part: Factors, weight: float, name: str, new: Factor) -> Tensor:
    """The directions of a part in new coordinates, times the root of its weight."""
    left, right = _overlaps(part.factors[name], new)
    v = part.directions[name]
    moved = left[:, : v.shape[1]] @ v @ right[: v.shape[2]]
    return moved * math.sqrt(abs(weight))


def _signs(parts: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    signs = [
        torch.full((len(v),), 1.0 if w >= 0 else -1.0, dtype=v.dtype, device=v.device)
        for p, w in _pairs(parts, weights)
        for v in [next(iter(p.directions.values()), torch.zeros(0))]
    ]
    return torch.cat(signs)


def _summed(
    parts: Sequence[Factors],
    weights: Sequence[float],
    block: Block,
    new: Factor,
    moved: Tensor | None,
    signs: Tensor,
) -> Factor:
    """A block's factor with the moments of all parts."""
    name, shape = block.name, block.shape
    if new.left is None or new.right is None:
        total = sum(w * p.factors[name].moments for p, w in _pairs(parts, weights))
        assert isinstance(total, Tensor)
        return Factor(total.clamp(min=0), new.rest)
    size = (new.left.shape[1], new.right.shape[1])
    moments = new.left.new_zeros(size)
    for part, weight in _pairs(parts, weights):
        old = part.factors[name]
        left, right = _overlaps(old, new)
        own = left.square() @ (part.residual(name) - old.rest) @ right.square() + old.rest
        moments = moments + weight * own
    if moved is not None:
        moments = moments + torch.einsum("k,kpq->pq", signs, moved.square())
    trace = sum(w * float(p.factors[name].trace(shape)) for p, w in _pairs(parts, weights))
    moments = moments.clamp(min=0)
    outside = shape[0] * shape[1] - moments.numel()
    rest = max(0.0, trace - float(moments.sum())) / outside if outside else 0.0
    return Factor(moments, new.rest + rest, new.left, new.right)
