"""Functionals over groups of rows: bags of embeddings, segments, matrices of experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.rules.registry import bilinear, composite, rule

EXTREMES = {"max": "amax", "min": "amin", "prod": "prod"}


def _reduced(rows: Tensor, group: Tensor, count: int, reduction: str) -> Tensor:
    """Rows (rows, ...) reduced to (count, ...) by the group of each."""
    start = rows.new_zeros(count, *rows.shape[1:])
    if reduction in EXTREMES:
        index = group.reshape(-1, *[1] * (rows.ndim - 1)).expand(rows.shape)
        return start.scatter_reduce(0, index, rows, EXTREMES[reduction], include_self=False)
    total = start.index_add(0, group, rows)
    if reduction == "sum":
        return total
    sizes = torch.bincount(group, minlength=count).clamp(min=1).to(rows.dtype)
    return total / sizes.reshape(-1, *[1] * (rows.ndim - 1))


@composite(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums, means or maxima over bags of rows of a table."""
    if max_norm is not None or scale_grad_by_freq or include_last_offset or padding_idx is not None:
        return NotImplemented
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if input.ndim == 2:  # (bags, rows)
        return rows.amax(1) if mode == "max" else getattr(rows, mode)(1)
    assert offsets is not None  # PyTorch requires it for (rows,)
    bag = torch.searchsorted(offsets, torch.arange(len(input), device=input.device), right=True) - 1
    return _reduced(rows, bag, len(offsets), mode)


@composite(torch.segment_reduce)
def segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Any:
    """Reductions of consecutive rows; empty segments are left to PyTorch."""
    if lengths is None or lengths.ndim != 1 or axis != 0 or initial is not None:
        return NotImplemented
    if not lengths.all():
        return NotImplemented
    segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    return _reduced(data, segment, len(lengths), reduce)


@composite(Tensor.scatter_reduce_)
def scatter_reduce_(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """Products in place; other reductions are left to PyTorch."""
    if reduce != "prod":
        return NotImplemented
    start = input.clone()  # a backward pass needs it
    products = torch.scatter_reduce(start, dim, index, src, reduce, include_self=include_self)
    return input.copy_(products)


@rule(*(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f))
def grouped_mm(
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Products with a matrix per group of rows, as in mixtures of experts."""
    if bias is not None:
        return NotImplemented
    return bilinear(partial(torch._grouped_mm, offs=offs, out_dtype=out_dtype), input, mat2)
