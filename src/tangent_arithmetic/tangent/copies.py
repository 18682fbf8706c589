"""Copies of modules, which have weights and state of their own."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.caches import CACHES
from tangent_arithmetic.tangent.state import (
    Attributes,
    attributes_enclosing,
    copied_results,
    tensors_kept,
)

Kind = TypeVar("Kind", bound=nn.Module)


def copy_of(module: Kind) -> Kind:
    """A deep copy of a module, with the flags of its parameters.

    Tensors that it has computed and keeps in attributes are copied without their graph.

    Raises:
        UsageError: if attributes are functions that enclose the module or a part of it, which
            would still call the original.
    """
    if names := attributes_enclosing(module):
        raise UsageError(
            f"expected a module that can be copied, got {type(module).__name__} with functions "
            f"that enclose parts of it in {', '.join(names)}: in a copy they would still call the "
            "original; make them methods, or functools.partial"
        )
    with torch.no_grad():  # or the copied weights of scripted modules are not leaves
        copied = copy.deepcopy(module, dict(copied_results(module)))
    for value, original in zip(copied.parameters(), module.parameters(), strict=True):
        if value.requires_grad != original.requires_grad:  # scripted modules have lost it
            value.requires_grad_(original.requires_grad)
    if module in CACHES:
        CACHES[copied] = set(CACHES[module])
    return copied


def copy_to_move(module: Kind) -> Kind:
    """As `copy_of`, without the tensors that it has computed from its own weights and keeps.

    Where the forward pass does not compute them again, it fails, and never uses them at other
    weights. Buffers are kept.
    """
    copied, buffers = copy_of(module), {id(buffer) for buffer in module.buffers()}
    kept = tensors_kept(module)
    stale = {key for key, value in kept if not value.is_leaf and id(value) not in buffers}
    Attributes(copied).clear(stale)
    return copied
