"""Operations in parts whose forward AD can be differentiated once more.

Differentiating PyTorch's own forward AD (PyTorch 2.14) of these operations is wrong, without a
word: fused normalisations treat their statistics as constants, solutions and determinants their
factors. Where there are no such parts, an error names the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.backends import replaced
from tangent_arithmetic.tangent.rules.normalization import by_channel, weight_norm

WRONG_STATISTICS = "PyTorch's forward AD differentiates batch statistics wrongly"


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = _normalized(input, list(range(-len(normalized_shape), 0)), eps)
    return _affine(y, weight, bias)


def _native_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _standardized(input, list(range(-len(normalized_shape), 0)), eps)
    return _affine(y, weight, bias), mean.detach(), rstd.detach()  # as PyTorch has it


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = input.reshape(len(input), num_groups, input.shape[1:].numel() // num_groups)
    y = _normalized(grouped, [-1], eps).reshape(input.shape)
    return _affine(y, *(by_channel(v, y) for v in (weight, bias)))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        raise NotImplementedError(WRONG_STATISTICS)
    y = _normalized(input, list(range(2, input.ndim)), eps)
    return _affine(y, *(by_channel(v, y) for v in (weight, bias)))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    return _standardized(x, dims, eps)[0]


def _standardized(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The values with mean 0 and variance 1 along axes; the mean; 1 over the deviation."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return (centred * rstd).to(x.dtype), mean, rstd


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training and running_mean is None:  # of a weight-standardised convolution, for instance
        y = _normalized(input, [0, *range(2, input.ndim)], eps)
        return _affine(y, *(by_channel(v, y) for v in (weight, bias)))
    if training:
        raise NotImplementedError(WRONG_STATISTICS)
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _of_torch(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.batch_norm` for `F.batch_norm`, which takes its arguments in another order."""

    def reordered(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        options = (use_input_stats, momentum, eps)
        return norm(input, running_mean, running_var, weight, bias, *options)

    return reordered


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    values, gates = input.chunk(2, dim)
    return values * torch.sigmoid(gates)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        return F.hardsigmoid(input, True)
    return F.relu6(input + 3) / 6


ATTENTION = F.scaled_dot_product_attention  # PyTorch's, also while `_attention` takes its place


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    """Attention; the derivative of a softmax over no keys would be NaN."""
    if attn_mask is None:
        return ATTENTION(query, key, value, None, *options, **named)
    forbidden = ~attn_mask if attn_mask.dtype is torch.bool else attn_mask == -torch.inf
    alone = forbidden.all(-1, keepdim=True)
    mask = attn_mask.masked_fill(alone, attn_mask.dtype is torch.bool)
    out = ATTENTION(query, key, value, mask, *options, **named)
    return out.masked_fill(alone, 0.0)


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    with replaced(F, {"scaled_dot_product_attention": _attention}):
        return F.multi_head_attention_forward(*args, **kwargs)


def _solve_ex(
    A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    lu, pivots, info = torch.linalg.lu_factor_ex(A, check_errors=check_errors)
    vector = B.ndim == 1 or B.shape == A.shape[:-1]
    right = B.unsqueeze(-1) if vector else B
    x = torch.linalg.lu_solve(lu, pivots, right, left=left)
    return torch.return_types.linalg_solve_ex((x.squeeze(-1) if vector else x, info))  # type: ignore[attr-defined,no-any-return]


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    return _solve_ex(A, B, left=left, check_errors=True)[0]


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return _solve(A.reshape(B.numel(), -1), B.reshape(-1)).reshape(A.shape[B.ndim :])


def _factors(A: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of U in A = P L U, and the determinant of P."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(A)
    exchanges = pivots != torch.arange(1, pivots.shape[-1] + 1, device=A.device)
    return lu.diagonal(dim1=-2, dim2=-1), 1 - 2 * (exchanges.sum(-1) % 2)


def _det(A: Tensor) -> Tensor:
    diagonal, sign = _factors(A)
    return diagonal.prod(-1) * sign


def _slogdet(A: Tensor) -> tuple[Tensor, Tensor]:
    diagonal, sign = _factors(A)
    result = (diagonal.sgn().prod(-1) * sign, diagonal.abs().log().sum(-1))
    return torch.return_types.linalg_slogdet(result)  # type: ignore[attr-defined,no-any-return]


def _logdet(A: Tensor) -> Tensor:
    sign, logarithm = _slogdet(A)
    return sign.log() + logarithm


def _householder_product(input: Tensor, tau: Tensor) -> Tensor:
    unit = torch.eye(*input.shape[-2:], dtype=input.dtype, device=input.device)
    reflectors, product = input.tril(-1) + unit, unit
    for k in reversed(range(tau.shape[-1])):
        v = reflectors[..., k : k + 1]
        product = product - tau[..., k, None, None] * v @ (v.mH @ product)
    return product


def _without_products(scatter: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(
        input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, **options: Any
    ) -> Tensor:
        if reduce == "prod":
            raise NotImplementedError("PyTorch's forward AD loses the tangents of products.")
        return scatter(input, dim, index, src, reduce, **options)

    return checked


SCATTERS = (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)

UNFUSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch._weight_norm: weight_norm,
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
    torch.native_layer_norm: _native_layer_norm,
    torch.instance_norm: _of_torch(_instance_norm),
    torch.batch_norm: _of_torch(_batch_norm),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    **{scatter: _without_products(scatter) for scatter in SCATTERS},
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    **dict.fromkeys((torch.det, torch.linalg.det, Tensor.det), _det),
    **dict.fromkeys((torch.slogdet, torch.linalg.slogdet, Tensor.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys(
        (torch.linalg.householder_product, torch.orgqr, Tensor.orgqr), _householder_product
    ),
}
