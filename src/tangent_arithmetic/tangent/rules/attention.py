r"""Attention: \(o = P v\), \(P = \mathrm{softmax}(S)\), \(S = s\, q k^\top + m\).

\[ dS = s\,(dq\, k^\top + q\, dk^\top), \quad dP = P \circ (dS - \Sigma (P \circ dS)), \quad
   do = dP\, v + P\, dv \]

PyTorch's fused kernel computes the value and stores no probabilities; the tangent recomputes them,
for a chunk of the batch at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.rules.registry import Pushes, Tangent, along, composite, rule
from tangent_arithmetic.tangent.stacks import Stacks

# Letters: B batch, H heads, L queries, S keys, E features per head, D features
CHUNK = 2**19  # probabilities in memory at once, so that they fit into the cache


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention of query (..., H, L, E), key (..., H, S, E) and value (..., H, S, Ev)."""
    if dropout_p > 0:
        return NotImplemented
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    if enable_gqa:  # not an argument in PyTorch 2.4
        options["enable_gqa"] = True
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale

    lead = out.shape[:-2] or (1,)

    def push(d: Tangent) -> Tensor:
        step = torch.empty_like(out.expand(*lead, *out.shape[-2:]))  # of the layout of out
        fill([d], [step])
        return step.view(out.shape)

    def several(d: Stacks) -> Tensor:
        alive = next(s.alive for s in map(d, (query, key, value, attn_mask)) if s is not None)
        like = torch.empty_like(out.expand(*lead, *out.shape[-2:]))
        shape, strides = (len(alive), *like.shape), (like.numel(), *like.stride())
        steps = torch.empty_strided(shape, strides, dtype=out.dtype, device=out.device)
        fill([along(d, k) for k in alive], list(steps))
        return steps.view(len(alive), *out.shape)

    def fill(ds: Sequence[Tangent], steps: Sequence[Tensor]) -> None:
        """Writes the tangent along each direction; the probabilities are computed once."""
        mask = _additive(attn_mask, is_causal, out, key.shape[-2])
        values = _ready((query, key, value, mask), lead, out)
        moved = [_ready(_moved(d, query, key, value, attn_mask, out), lead, out) for d in ds]
        size = max(1, CHUNK // max(1, math.prod(lead[1:]) * out.shape[-2] * key.shape[-2]))
        for part in (slice(i, i + size) for i in range(0, lead[0], size)):
            q, k, v, m = (None if x is None else x[part].flatten(0, -3) for x in values)
            assert q is not None and k is not None and v is not None
            p = _probabilities(q, k, m, factor)
            for tensors, step in zip(moved, steps, strict=True):
                dq, dk, dv, dmask = (None if x is None else x[part].flatten(0, -3) for x in tensors)
                found = _tangent(p, q, k, v, dq, dk, dv, dmask, factor=factor)
                step[part] = found.view(step[part].shape)

    return out, Pushes(push, several)


Tensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # q, k, v, mask


def _moved(
    d: Tangent, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor
) -> Tensors:
    """The tangents of all inputs along one direction."""
    dmask = d(mask)
    if dmask is not None:
        dmask = dmask.expand(*dmask.shape[:-2], out.shape[-2], key.shape[-2])
    return d(query), d(key), d(value), dmask


def _ready(tensors: Tensors, lead: Sequence[int], like: Tensor) -> Tensors:
    q, k, v, mask = (None if x is None else _broadcast(x, lead, like) for x in tensors)
    return q, k, v, mask


def _broadcast(x: Tensor, lead: Sequence[int], like: Tensor) -> Tensor:
    """(..., L, E) as (*lead, L, E), repeating heads of keys for grouped queries."""
    if x.ndim >= 3 and 1 < x.shape[-3] != lead[-1]:
        x = x.repeat_interleave(lead[-1] // x.shape[-3], -3)
    return x.to(like.dtype).expand(*lead, *x.shape[-2:])


def _additive(mask: Tensor | None, is_causal: bool, out: Tensor, num_keys: int) -> Tensor | None:
    """The additive mask, broadcastable to (..., L, S); None for no mask."""
    if is_causal:
        mask = out.new_ones(out.shape[-2], num_keys, dtype=torch.bool).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = _forbidding(~mask, out.dtype)
    return mask.expand(*mask.shape[:-2], out.shape[-2], num_keys)


def _forbidding(where: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of a boolean one that is true where attention is forbidden."""
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, -math.inf)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """P of (B * H, L, E), of shape (B * H, L, S)."""
    if mask is None:
        scores = torch.bmm(q, k.mT).mul_(factor)
    else:
        scores = torch.baddbmm(mask, q, k.mT, alpha=factor)
    p = scores.softmax(-1)
    return p if mask is None else p.nan_to_num_(0.0)  # a fully masked row gives 0, as in PyTorch


def _tangent(
    p: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    *,
    factor: float,
) -> Tensor:
    """The tangent of attention over (B * H, L, E)."""
    step = None if dv is None else torch.bmm(p, dv)
    ds = None if dq is None else torch.bmm(dq, k.mT)
    if dk is not None:
        ds = torch.bmm(q, dk.mT) if ds is None else ds.baddbmm_(q, dk.mT)
    ds = None if ds is None else ds.mul_(factor)
    if dmask is not None:
        ds = dmask if ds is None else ds.add_(dmask)
    if ds is not None:
        dp = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
        step = torch.bmm(dp, v) if step is None else step.baddbmm_(dp, v)
    assert step is not None
    return step


@composite(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Multi-head attention of (L, B, D): projections, heads, attention, projection."""
    rare = (bias_k, bias_v, static_k, static_v)
    if any(x is not None for x in rare) or add_zero_attn or (training and dropout_p > 0):
        return NotImplemented
    if query.ndim != 3 or query.shape[-1] != embed_dim_to_check:
        return NotImplemented
    if not _is_usual(query, key, num_heads, attn_mask, key_padding_mask, is_causal):
        return NotImplemented
    batch, width = query.shape[1:]
    # in the layout of a batch-first module this copies nothing
    query, key, value = _batch_first(query, key, value)
    matrices: Sequence[Any] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if in_proj_weight is not None and query is key and key is value:  # one product, not three
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).unflatten(-1, (3, width)).unbind(-2)
    else:
        if not use_separate_proj_weight:
            assert in_proj_weight is not None
            matrices = in_proj_weight.chunk(3)
        bias: Sequence[Any] = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), matrices, bias)

    def heads(x: Tensor) -> Tensor:  # (B, L, D) -> (B, H, L, E)
        split: Tensor = x.unflatten(-1, (num_heads, -1))
        return split.transpose(1, 2)

    q, k, v = heads(q), heads(k), heads(v)
    mask = _merged_mask(attn_mask, key_padding_mask, batch, num_heads, q)
    weights: Tensor | None = None
    if need_weights:
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.mT
        weights = torch.softmax(scores if mask is None else scores + mask, -1)  # (B, H, L, S)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        causal = is_causal and key_padding_mask is None
        out = F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal)
    out = F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), weights


def _is_usual(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> bool:
    """Whether the masks have valid shapes; for others PyTorch raises its own errors."""
    (queries, batch, _), keys = query.shape, len(key)
    shapes = ((queries, keys), (batch * num_heads, queries, keys))
    if attn_mask is None:
        return not is_causal and (padding is None or padding.shape == (batch, keys))
    return attn_mask.shape in shapes and (padding is None or padding.shape == (batch, keys))


def _batch_first(*tensors: Tensor) -> list[Tensor]:
    """(L, B, D) as (B, L, D); identical objects stay identical."""
    transposed = {id(x): x.transpose(0, 1) for x in tensors}
    return [transposed[id(x)] for x in tensors]


def _merged_mask(
    attn_mask: Tensor | None, padding: Tensor | None, batch: int, num_heads: int, q: Tensor
) -> Tensor | None:
    """The sum of both masks, additive and broadcastable to (B, H, L, S)."""

    def numbers(mask: Tensor) -> Tensor:
        return _forbidding(mask, q.dtype) if mask.dtype == torch.bool else mask.to(q.dtype)

    parts = []
    if attn_mask is not None:
        mask = numbers(attn_mask)
        parts.append(mask if mask.ndim == 2 else mask.unflatten(0, (batch, num_heads)))
    if padding is not None:
        parts.append(numbers(padding)[:, None, None, :])
    return None if not parts else sum(parts[1:], parts[0])
