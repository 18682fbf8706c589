"""The outputs of a pass: trees of tensors, each split into value and tangents."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.state import tensors_in

logger = logging.getLogger(__name__)


@functools.cache
def log_once(reason: str, consequence: str) -> None:
    """Logs a fact about a module or an operation once in a process."""
    logger.info("%s: %s", reason, consequence)


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache of transformers, which is not a pytree."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def flatten(out: Any) -> tuple[list[Any], Any]:
    """The leaves of a module's output and its structure; caches become None.

    Raises:
        TypeError: if a leaf is an object that contains tensors, which would have no tangents.
    """
    leaves, spec = pytree.tree_flatten(out, is_leaf=is_cache)
    return [_checked(value) for value in leaves], spec


def _checked(value: Any) -> Any:
    if is_cache(value):
        log_once(f"{type(value).__name__} has no tangents", "replaced by None")
        return None
    if not isinstance(value, Tensor) and any(True for _ in tensors_in(value, math.inf)):
        raise TypeError(
            "expected outputs that are tensors, tuples, lists or dicts, got "
            f"{type(value).__name__} with tensors in it; return a dict, or register the class with "
            "torch.utils._pytree.register_pytree_node"
        )
    return value


def differentiable_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree that can have tangents: real and complex floating-point ones."""
    for value in pytree.tree_leaves(tree):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            yield value


def step(value: Any, tangents: Sequence[Tensor] | None, k: int) -> Any:
    """The k-th derivative of one output, with the gradient of the primal's graph."""
    if not isinstance(value, Tensor):
        return value
    tangent = torch.zeros_like(value) if tangents is None else tangents[k].detach()
    return _Carry.apply(value, tangent) if value.requires_grad else tangent


class _Carry(torch.autograd.Function):
    """Returns the tangent in the forward pass; backpropagates into the primal's graph."""

    @staticmethod
    def forward(ctx: Any, primal: Tensor, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
