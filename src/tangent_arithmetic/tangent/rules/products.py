r"""Bilinear and linear functionals: \(d(x W) = dx\, W + x\, dW\)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.rules.registry import (
    Push,
    Pushes,
    Tangent,
    along_first,
    bilinear,
    composite,
    rule,
    total,
)
from tangent_arithmetic.tangent.stacks import Stack, Stacks


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    r"""\(y = x W^\top + b\): input (..., in), weight (out, in), bias (out,)."""
    if weight.ndim != 2:
        return NotImplemented
    y = F.linear(input, weight, bias)

    def push(d: Tangent) -> Tensor | None:
        dx, dweight, dbias = (
            None if v is None else v.to(y.dtype) for v in (d(input), d(weight), d(bias))
        )
        x, w = input.to(y.dtype), weight.to(y.dtype)
        step = None
        for inputs, matrix in ((x, dweight), (dx, w)):
            if inputs is None or matrix is None:
                continue
            rows = _rows(inputs)
            if step is not None:
                step.addmm_(rows, matrix.mT)
            elif dbias is not None:
                step = torch.addmm(dbias, rows, matrix.mT)
            else:
                step = rows @ matrix.mT
        if step is None:
            return None if dbias is None else dbias.expand(y.shape)
        return step.reshape(y.shape)

    def several(d: Stacks) -> Tensor | None:
        dx, dweight, dbias = d(input), d(weight), d(bias)
        step = None if dx is None else F.linear(dx.values.to(y.dtype), weight.to(y.dtype))
        if dweight is not None:
            step = _add_products(step, input.to(y.dtype), dweight, y)
        if dbias is None:
            return step
        shift = dbias.lifted(y.ndim).to(y.dtype)
        return shift if step is None else step.add_(shift)

    return y, Pushes(push, several)


def _rows(x: Tensor) -> Tensor:
    """(..., in) as (tokens, in), where `in` may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _add_products(step: Tensor | None, x: Tensor, dweight: Stack, like: Tensor) -> Tensor:
    """`step + x dW^T` of each direction, written to where it belongs."""
    rows = _rows(x)
    parts = [part.to(like.dtype) for part in dweight.parts]
    new = step is None
    if step is None:
        step = like.new_empty(len(parts), *like.shape)
    for place, part in zip(step.view(len(parts), len(rows), like.shape[-1]), parts, strict=True):
        if new:
            torch.mm(rows, part.mT, out=place)
        else:
            place.addmm_(rows, part.mT)
    return step


PRODUCTS = (torch.matmul, torch.mm, torch.bmm, torch.sparse.mm, torch.spmm)
PRODUCTS_OF_TENSORS = (Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)


@rule(*PRODUCTS, *PRODUCTS_OF_TENSORS)
def matmul(input: Tensor, other: Tensor) -> tuple[Tensor, Push]:
    """A matrix product, possibly batched; one factor may be a sparse constant."""
    return bilinear(torch.matmul, input, other)


@composite(torch.addmm, Tensor.addmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """A product with a bias (`Conv1D` of GPT-2), as a dense layer."""
    if beta != 1 or alpha != 1 or input.ndim != 1 or not isinstance(mat1, Tensor):
        return NotImplemented
    return F.linear(mat1, mat2.t(), input)


def _convolution(convolve: Callable[..., Tensor]) -> None:
    @rule(convolve)
    def convolution(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Push]:
        y = convolve(input, weight, bias, *args, **kwargs)

        def push(d: Tangent) -> Tensor | None:
            dx, dweight, dbias = d(input), d(weight), d(bias)
            if dweight is None and dbias is not None:
                dweight = torch.zeros_like(weight)
            step = None if dweight is None else convolve(input, dweight, dbias, *args, **kwargs)
            if dx is None:
                return step
            other = convolve(dx, weight, None, *args, **kwargs)
            return other if step is None else step.add_(other)

        def several(d: Stacks) -> Any:
            dx, dweight, dbias = d(input), d(weight), d(bias)
            if input.ndim != weight.ndim:  # without a batch
                return NotImplemented
            step = None
            if dx is not None:  # directions as further examples
                folded = convolve(dx.values.flatten(0, 1), weight, None, *args, **kwargs)
                step = folded.unflatten(0, (len(dx.alive), -1))
            if dweight is not None:
                products = [convolve(input, v, None, *args, **kwargs) for v in dweight.parts]
                step = _add_each(step, products)
            if dbias is None:
                return step
            shift = dbias.values.to(y.dtype)[
                (slice(None), None, slice(None), *[None] * (y.ndim - 2))
            ]
            return shift if step is None else step.add_(shift)

        return y, Pushes(push, several)


def _add_each(step: Tensor | None, terms: Sequence[Tensor]) -> Tensor:
    """Adds one term a direction to the stacked tangents."""
    if step is None:
        return torch.stack(list(terms))
    for place, term in zip(step, terms, strict=True):
        place.add_(term)
    return step


for _convolve in (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
):  # fmt: skip
    _convolution(_convolve)


@rule(torch.einsum)
def einsum(equation: str, *operands: Any) -> Any:
    """A sum of products, linear in each operand."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        return NotImplemented
    y = torch.einsum(equation, *operands)

    def push(d: Tangent) -> Tensor | None:
        return total(
            *(
                torch.einsum(equation, *operands[:k], step, *operands[k + 1 :])
                for k, step in enumerate(map(d, operands))
                if step is not None
            )
        )

    return y, push


@rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of a table; the tangent is the same rows of its tangent. Gradients are always dense."""
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    y = F.embedding(input, weight, padding_idx)
    return y, lambda d: F.embedding(input, d(weight))


def _linear_map(function: Callable[..., Tensor]) -> None:
    @rule(function)
    def linear_map(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Push]:
        y = function(input, *args, **kwargs)

        def several(d: Stacks) -> Tensor | None:
            dx = d(input)
            return None if dx is None else along_first(lambda v: function(v, *args, **kwargs), dx)

        return y, Pushes(lambda d: function(d(input), *args, **kwargs), several)


for _function in (
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d, torch.mean, Tensor.mean,
):  # fmt: skip
    _linear_map(_function)
