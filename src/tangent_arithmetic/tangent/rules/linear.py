"""Functionals that are linear in what they are given: sums, joins, views.

PyTorch's forward AD has their tangents. These rules are for stacks of tangents along several
directions, to which a linear functional applies as to one more axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.tangent.rules.registry import STACKED, VIEWS
from tangent_arithmetic.tangent.stacks import Stacks

Several = Callable[[Stacks], Tensor | None]


def _stacked(*functionals: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        STACKED.update(dict.fromkeys(functionals, function))
        return function

    return register


def _sum(y: Tensor, input: object, other: object, sign: float) -> tuple[Tensor, Several]:
    def several(d: Stacks) -> Tensor | None:
        left, right = (None if s is None else s.lifted(y.ndim) for s in (d(input), d(other)))
        if right is None:
            return left
        if left is None:
            return right if sign == 1 else right * sign
        return torch.add(left, right, alpha=sign)

    return y, several


@_stacked(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    """A sum with broadcasting; either term may be a number."""
    return _sum(torch.add(input, other, alpha=alpha), input, other, alpha)


@_stacked(torch.sub, Tensor.sub, Tensor.__sub__)
def sub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    """A difference with broadcasting; either term may be a number."""
    return _sum(torch.sub(input, other, alpha=alpha), input, other, -alpha)


@_stacked(torch.rsub, Tensor.__rsub__)
def rsub(input: Any, other: Any) -> Any:
    """A difference with its terms exchanged."""
    return _sum(torch.rsub(input, other), other, input, -1)


@_stacked(Tensor.add_, Tensor.__iadd__)
def add_(input: Tensor, other: Any, *, alpha: float = 1) -> Any:
    """A sum in place."""
    return _sum(input.add_(other, alpha=alpha), input, other, alpha)


@_stacked(torch.cat, torch.concat)
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    """Tensors joined along an axis."""
    y = torch.cat(tuple(tensors), dim)
    axis = dim % y.ndim

    def several(d: Stacks) -> Tensor | None:
        stacks = [d(x) for x in tensors]
        count = next(len(s.alive) for s in stacks if s is not None)
        blocks = [
            x.new_zeros(()).expand(count, *x.shape) if s is None else s.values
            for x, s in zip(tensors, stacks, strict=True)
            if x.shape != (0,)  # which PyTorch ignores
        ]
        return torch.cat(blocks, axis + 1)

    return y, several


for _name in (
    "chunk", "contiguous", "expand", "expand_as", "flatten", "movedim", "narrow", "neg", "permute",
    "repeat", "reshape", "reshape_as", "roll", "select", "split", "squeeze", "sum", "swapaxes", "t",
    "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view", "__getitem__", "__neg__",
):  # fmt: skip
    VIEWS.update(f for owner in (torch, Tensor) if (f := getattr(owner, _name, None)) is not None)
VIEWS.update(getattr(Tensor, name).__get__ for name in ("T", "mT"))
