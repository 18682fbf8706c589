"""Which parameters are trained: predicates over names and modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from tangent_arithmetic.runtime.errors import UsageError
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


def predicate_of(which: str) -> Predicate:
    """The predicate of a choice: one of `TRAINABLE`, or a regular expression of parameters' names.

    Raises:
        UsageError: for an invalid expression.
    """
    if which in TRAINABLE:
        return TRAINABLE[which]
    try:
        pattern = re.compile(which)
    except re.error as error:
        raise UsageError(
            f"--trainable: expected {', '.join(TRAINABLE)} or a regular expression, got {which!r} "
            f"({error})"
        ) from error
    return lambda name, modules: pattern.search(name) is not None


def train_only(model: nn.Module, which: str) -> None:
    """Freezes, in place, all but the parameters of a choice, see `predicate_of`.

    Raises:
        UsageError: if there are none.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    predicate = predicate_of(which)
    try:
        select(model, predicate)
    except ValueError as error:
        shown = ", ".join(names[:: max(1, len(names) // 6)])
        raise UsageError(
            f"--trainable={which} matches none of the {len(names)} parameters; their names are "
            f"such as {shown}"
        ) from error


@TRAINABLE.register("all")
def everything(name: str, modules: Sequence[nn.Module]) -> bool:
    """All parameters."""
    return True


@TRAINABLE.register("attention")
def attention(name: str, modules: Sequence[nn.Module]) -> bool:
    """Projections of attention layers, recognised by class: `MultiheadAttention`, `Attention`."""
    return any(re.search(r"Attention(Pool\w*)?$", type(module).__name__) for module in modules)


@TRAINABLE.register("attention-weights")
def attention_weights(name: str, modules: Sequence[nn.Module]) -> bool:
    """The matrices of attention layers, without biases (arXiv:2407.07089)."""
    return attention(name, modules) and not name.rpartition(".")[2].endswith("bias")


@TRAINABLE.register("norm_and_bias")
def norm_and_bias(name: str, modules: Sequence[nn.Module]) -> bool:
    """Biases, and weights of normalisation layers."""
    leaf = name.rpartition(".")[2]
    return leaf.endswith("bias") or bool(re.search("Norm", type(modules[-1]).__name__))
