"""Calling a module with other weights, or in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.tangent.caches import empty_caches


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """A context in which a module and its parts are in evaluation mode; then each is as before.

    Args:
        module: the module; of anything else with a method `eval` the mode is not restored.
    """
    parts = module.modules() if isinstance(module, nn.Module) else ()
    flags = {part: part.training for part in parts}
    empty_caches(module)
    module.eval()
    try:
        yield
    finally:
        for part, training in flags.items():
            part.training = training


def functional_call(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """As `torch.func.functional_call`, also for a module that is registered under two names.

    That of PyTorch replaces the weights of such a module once a name, and leaves one of the
    replacements in it. Weights that are tied take the value given for any of their names.

    Args:
        module: the module; it is as before afterwards.
        weights: parameters and buffers by name; the others are the module's own.
        args: its inputs.
        kwargs: its keyword inputs.
    """
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    given = {id(named[name]): value for name, value in weights.items() if name in named}
    places = {name: value for name, value in weights.items() if name not in named}
    for path, part in module.named_modules():  # each once
        for leaf, own in (*part._parameters.items(), *part._buffers.items()):
            if own is not None and id(own) in given:
                places[f"{path}.{leaf}" if path else leaf] = given[id(own)]
    empty_caches(module)
    try:
        return torch.func.functional_call(
            module, places, args, dict(kwargs or {}), tie_weights=False
        )
    finally:
        empty_caches(module)
