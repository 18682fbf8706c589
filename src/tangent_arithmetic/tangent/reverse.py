"""Tangents from backward passes, for functionals without a forward-mode derivative.

The backward pass u -> J^T u is linear, so its own backward pass is J. If it cannot be
differentiated, each element of a small output still has its gradient: (J v)_i = <grad y_i, v>.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.replay import random_states, set_random_states
from tangent_arithmetic.tangent.state import unpack

ROWS = 64  # elements of the output for which a backward pass each is acceptable


def by_reverse(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The dual output of a functional of dual tensors; NotImplemented if that is impossible."""
    inputs, spec = pytree.tree_flatten((args, kwargs))
    parts = [unpack(v) if isinstance(v, Tensor) else (v, None) for v in inputs]
    tangents = {k: t.detach() for k, (_, t) in enumerate(parts) if t is not None}

    def value(leaves: list[Any]) -> Any:
        new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
        return func(*new_args, **new_kwargs)

    states = random_states()
    out, form = pytree.tree_flatten(value([primal for primal, _ in parts]))
    set_random_states(states)
    with torch.enable_grad():
        leaves = [v.detach() if isinstance(v, Tensor) else v for v, _ in parts]
        x = [leaves[k].requires_grad_() for k in tangents]
        recorded = enumerate(pytree.tree_leaves(value(leaves)))
        y = {k: v for k, v in recorded if isinstance(v, Tensor) and v.requires_grad}
        steps = _push(list(y.values()), x, list(tangents.values()))
    if steps is None:
        return NotImplemented
    for k, step in zip(y, steps, strict=True):
        out[k] = forward_ad.make_dual(out[k], step.to(out[k].dtype))
    return pytree.tree_unflatten(out, form)


def _push(y: list[Tensor], x: list[Tensor], v: list[Tensor]) -> list[Tensor] | None:
    """J v of recorded outputs y of x; None if their backward pass does not allow it."""
    if not y or any(output.is_complex() for output in y):
        return None
    try:
        u = [torch.zeros_like(output, requires_grad=True) for output in y]
        back = torch.autograd.grad(y, x, u, create_graph=True, allow_unused=True)
        pairs = [(g, w) for g, w in zip(back, v, strict=True) if g is not None]
        grads, weights = zip(*pairs, strict=True)
        return [step.detach() for step in torch.autograd.grad(grads, u, weights)]
    except (RuntimeError, ValueError):
        few = 0 < sum(output.numel() for output in y) <= ROWS
        return [_row_by_row(output, x, v) for output in y] if few else None


def _row_by_row(y: Tensor, x: list[Tensor], v: list[Tensor]) -> Tensor:
    """J v from one backward pass per element of y."""

    def along(element: Tensor) -> Tensor:
        grads = torch.autograd.grad(element, x, retain_graph=True, allow_unused=True)
        terms = [(g * w).sum() for g, w in zip(grads, v, strict=True) if g is not None]
        return torch.stack(terms).sum().detach() if terms else torch.zeros_like(element)

    return torch.stack([along(element) for element in y.flatten()]).reshape(y.shape)
