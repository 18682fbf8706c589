r"""Normalisations: \(y = \hat x\, w + b\), \(\hat x = (x - \mu) / \sigma\).

\(dy = d\hat x\, w + \hat x\, dw + db\). If the statistics are those of x, the Jacobian of
\(\hat x\) in \(x\) is symmetric, and PyTorch's backward kernel computes \(d\hat x\).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.rules.registry import Push, Pushes, Tangent, composite, rule
from tangent_arithmetic.tangent.stacks import Stack, Stacks


def _standardized(
    x: Tensor, dx: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor | None]:
    """`x` standardised over its last dimensions, of `shape`, and the tangent."""
    xhat, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    if dx is None:
        return xhat, None
    backward = torch.ops.aten.native_layer_norm_backward
    flags = [True, False, False]  # only the gradient in x
    return xhat, backward(dx.to(x.dtype), x, shape, mean, rstd, None, None, flags)[0]


def _standardized_stack(
    x: Tensor, dx: Stack | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor | None]:
    """`x` standardised over its last dimensions, of `shape`, and the stacked tangents."""
    xhat, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    if dx is None:
        return xhat, None
    backward = torch.ops.aten.native_layer_norm_backward
    flags, step = [True, False, False], x.new_empty(len(dx.alive), *x.shape)
    for place, part in zip(step, dx.parts, strict=True):
        place.copy_(backward(part.to(x.dtype), x, shape, mean, rstd, None, None, flags)[0])
    return xhat, step


def _affine(
    xhat: Tensor | None,
    dxhat: Tensor | None,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Tensor | None:
    """`dxhat * weight + xhat * dweight + dbias`; may overwrite dxhat."""
    step = dxhat
    if step is not None and weight is not None:
        step = step.mul_(weight)
    if dweight is not None:
        assert xhat is not None
        step = xhat * dweight if step is None else step.addcmul_(xhat, dweight)
    if dbias is not None:
        step = dbias if step is None else step.add_(dbias)
    return step


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Push]:
    """Layer normalisation over the last dimensions."""
    shape = list(normalized_shape)
    y = F.layer_norm(input, shape, weight, bias, eps)

    def push(d: Tangent) -> Tensor | None:
        dx, dweight, dbias = d(input), d(weight), d(bias)
        xhat, dxhat = _standardized(input.to(y.dtype), dx, shape, eps)
        step = _affine(xhat, dxhat, weight, dweight, dbias)
        return None if step is None else step.expand(y.shape)

    def several(d: Stacks) -> Tensor | None:
        dx, dweight, dbias = d(input), d(weight), d(bias)
        xhat, dxhat = _standardized_stack(input.to(y.dtype), dx, shape, eps)
        steps = (None if v is None else v.lifted(y.ndim).to(y.dtype) for v in (dweight, dbias))
        return _affine(xhat, dxhat, weight, *steps)

    return y, Pushes(push, several)


@rule(F.group_norm, torch.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Push]:
    """Group normalisation of (batch, channels, ...): layer normalisation over each group."""
    y = F.group_norm(input, num_groups, weight, bias, eps)

    def push(d: Tangent) -> Tensor | None:
        dx = d(input)
        size = input.shape[1:].numel() // num_groups
        x = input.to(y.dtype).reshape(len(input) * num_groups, size)
        dx = None if dx is None else dx.reshape(x.shape)
        both = _standardized(x, dx, x.shape[1:], eps)
        xhat, dxhat = (None if v is None else v.reshape(y.shape) for v in both)
        parts = [by_channel(v, y) for v in (weight, d(weight), d(bias))]
        step = _affine(xhat, dxhat, *parts)
        return None if step is None else step.expand(y.shape)

    return y, push


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Batch normalisation in eval mode, an affine map of each channel."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    y = F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if y.requires_grad and len(y) == 1 and y.is_contiguous():
        # PyTorch 2.14 misreads the gradient of a single example in another memory format
        y.register_hook(Tensor.contiguous)

    def push(d: Tangent) -> Tensor | None:  # PyTorch's kernel does the affine maps in one pass
        dx, dweight, dbias = d(input), d(weight), d(bias)
        if dweight is None:
            if dx is None:
                return None if dbias is None else by_channel(dbias, y).expand(y.shape)
            shift = torch.zeros_like(running_mean) if dbias is None else dbias
            return F.batch_norm(
                dx, torch.zeros_like(running_mean), running_var, weight, shift, False, momentum, eps
            )
        if dx is None:
            return F.batch_norm(
                input, running_mean, running_var, dweight, dbias, False, momentum, eps
            )
        tilt = torch.rsqrt(running_var + eps) * dweight
        shift = -running_mean * tilt if dbias is None else dbias - running_mean * tilt
        step = F.batch_norm(
            dx, torch.zeros_like(running_mean), running_var, weight, shift, False, momentum, eps
        )
        return step.addcmul_(input.to(y.dtype), by_channel(tilt, y))

    def several(d: Stacks) -> Tensor | None:
        dx, dweight, dbias = d(input), d(weight), d(bias)
        step, shift = None, None if dbias is None else dbias.values
        if dx is not None:
            zero = torch.zeros_like(running_mean)
            folded = dx.values.to(y.dtype).flatten(0, 1)
            step = F.batch_norm(folded, zero, running_var, weight, None, False, momentum, eps)
            step = step.unflatten(0, (len(dx.alive), -1))
        if dweight is not None:
            tilt = torch.rsqrt(running_var + eps) * dweight.values  # (directions, channels)
            shift = -running_mean * tilt if shift is None else shift - running_mean * tilt
            term = input.to(y.dtype), _by_channel_stack(tilt, y)
            step = term[0] * term[1] if step is None else step.addcmul_(*term)
        if shift is None:
            return step
        shift = _by_channel_stack(shift, y)
        return shift if step is None else step.add_(shift)

    return y, Pushes(push, several)


@composite(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Weight normalisation, `g * v / |v|`; norms are over all dimensions but `dim`, -1 for all."""
    others = [i for i in range(v.ndim) if i != dim]
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=True)
    return v * (g / norm)


def _by_channel_stack(values: Tensor, like: Tensor) -> Tensor:
    """(directions, channels) as (directions, 1, channels, 1, ...)."""
    shape = (len(values), 1, -1, *[1] * (like.ndim - 2))
    return values.to(like.dtype).reshape(shape)


def by_channel(value: Tensor | None, like: Tensor) -> Any:
    """(channels,) as (channels, 1, ...), to broadcast over (batch, channels, ...)."""
    if value is None:
        return None
    return value.to(like.dtype).reshape(-1, *[1] * (like.ndim - 2))
