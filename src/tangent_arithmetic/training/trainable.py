"""Which parameters are trained: predicates over names and modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from tangent_arithmetic.runtime.registry import Registry
from tangent_arithmetic.tangent.linearized import LinearizedModel

Predicate = Callable[[str, Sequence[nn.Module]], bool]  # name, enclosing modules, outermost first
TRAINABLE: Registry[Predicate] = Registry("choice of trainable parameters")


def select(model: nn.Module, predicate: Predicate) -> None:
    """Freezes, in place, the parameters that a predicate rejects; frozen ones stay frozen.

    Args:
        model: the model; in a linearised one, modules are those of the model that it expands.
        predicate: whether to train a parameter, given its name and enclosing modules.

    Raises:
        ValueError: if no parameter is left to train.
    """
    left = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rejected = [p for name, p in left if not predicate(name, _enclosing(model, name))]
    if len(rejected) == len(left):
        raise ValueError(f"expected trainable parameters in {type(model).__name__}, got none")
    for parameter in rejected:
        parameter.requires_grad_(False)


def _enclosing(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain a parameter, outermost first."""
    modules = [model]
    for part in name.split(".")[:-1]:
        outer = modules[-1]
        if isinstance(outer, LinearizedModel):
            outer = outer.module0()
        modules.append(outer.get_submodule(part))
    return modules


@TRAINABLE.register("everything")
def everything(name: str, modules: Sequence[nn.Module]) -> bool:
    """All parameters."""
    return True


@TRAINABLE.register("attention")
def attention(name: str, modules: Sequence[nn.Module]) -> bool:
    """Projections of attention layers, recognised by class: `MultiheadAttention`, `Attention`."""
    return any(re.search(r"Attention(Pool\w*)?$", type(module).__name__) for module in modules)


@TRAINABLE.register("norm_and_bias")
def norm_and_bias(name: str, modules: Sequence[nn.Module]) -> bool:
    """Biases, and weights of normalisation layers."""
    leaf = name.rpartition(".")[2]
    return leaf.endswith("bias") or bool(re.search("Norm", type(modules[-1]).__name__))
