"""Which parameters are trained: predicates over names and modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.registry import Registry

Predicate = Callable[[str, Sequence[nn.Module]], bool]  # name, modules around it, outermost first
TRAINABLE: Registry[Predicate] = Registry("choice of trainable parameters")


def select(model: nn.Module, predicate: Predicate) -> None:
    """Freezes, in place, the parameters that a predicate rejects; frozen ones stay frozen.

    Args:
        model: the model; a linear one has the modules of the model that it expands.
        predicate: whether to train a parameter, by its name and the modules that it lies in.

    Raises:
        ValueError: if nothing is left to train.
    """
    left = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rejected = [p for name, p in left if not predicate(name, _enclosing(model, name))]
    if len(rejected) == len(left):
        raise ValueError(f"expected trainable parameters in {type(model).__name__}, got none")
    for parameter in rejected:
        parameter.requires_grad_(False)


def _enclosing(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a parameter lies in, outermost first."""
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
    """Projections of attention layers, told by their class: `MultiheadAttention`, `Attention`."""
    return any(re.search(r"Attention(Pool\w*)?$", type(module).__name__) for module in modules)


@TRAINABLE.register("norm_and_bias")
def norm_and_bias(name: str, modules: Sequence[nn.Module]) -> bool:
    """Biases, and weights of normalisation layers."""
    leaf = name.rpartition(".")[2]
    return leaf.endswith("bias") or bool(re.search("Norm", type(modules[-1]).__name__))
