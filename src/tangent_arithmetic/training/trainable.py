"""Which parameters are trained: predicates over names and modules.

`--trainable` names one: a word of `TRAINABLE`, `last:K`, or a regular expression of names. Two
other choices train new parameters in place of a model's own, see `lora.py` and `talos.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.registry import Registry
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.towers import after_block, blocks_of

Predicate = Callable[[str, Sequence[nn.Module]], bool]  # name, enclosing modules, outermost first
TRAINABLE: Registry[Predicate] = Registry("choice of trainable parameters")
ATTENTION = r"Attention(?!al|\w*(Block|Layer|Mask))\w*$"  # classes
MLP = r"(Mlp|MLP|FFN|FeedForward|SwiGLU|DenseAct|Intermediate|(?<!Self)Output$)(?!\w*(Mixer|Head))"
MLP_NAMES = r"^((mlp|ffn|feed_?forward)\w*|linear[12])$"
FORMS = ("last:K", "lora:R", "talos")
LEAST_SENSITIVE = 0.1  # the share that TaLoS trains


@dataclass(frozen=True)
class Choice:
    """A value of `--trainable`.

    Attributes:
        kind: "subset" of the model's own parameters, "lora" or "talos".
        which: the subset; of "lora", the subset whose matrices have adapters.
        number: the rank of adapters, or the share of weights that TaLoS trains.
    """

    kind: Literal["subset", "lora", "talos"]
    which: str
    number: float = 0.0


def choice_of(text: str) -> Choice:
    """Parses a value of `--trainable`.

    Raises:
        UsageError: if R is no positive whole number, or a share is not between 0 and 1.
    """
    word, _, rest = text.partition(":")
    if word == "lora":
        rank, _, which = rest.partition(":")
        return Choice("lora", which or "attention-weights", _whole(text, rank, "lora:R, R a rank"))
    if word == "talos":
        try:
            share = float(rest) if ":" in text else LEAST_SENSITIVE
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise UsageError(
                f"--trainable={shown(text)}: expected talos or talos:SHARE, the share of weights "
                "to train, above 0 and below 1, such as talos:0.1"
            )
        return Choice("talos", "all", share)
    return Choice("subset", text)


def _whole(text: str, number: str, form: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", number):
        raise UsageError(f"--trainable={shown(text)}: expected {form}, 1 or more")
    return int(number)


def select(model: nn.Module, predicate: Predicate) -> None:
    """Freezes, in place, the parameters that a predicate rejects; frozen ones stay frozen.

    Args:
        model: the model; in a linearised one, modules are those of the model that it expands.
        predicate: whether to train a parameter, given its name and enclosing modules.

    Raises:
        ValueError: if no parameter is left to train.
    """
    left = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rejected = [p for name, p in left if not predicate(name, enclosing(model, name))]
    if len(rejected) == len(left):
        raise ValueError(f"expected trainable parameters in {type(model).__name__}, got none")
    for parameter in rejected:
        parameter.requires_grad_(False)


def enclosing(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain a parameter, outermost first."""
    modules = [model]
    for part in name.split(".")[:-1]:
        outer = modules[-1]
        if isinstance(outer, LinearizedModel):
            outer = outer.module0()
        modules.append(outer.get_submodule(part))
    return modules


def bare(model: nn.Module) -> nn.Module:
    """The module whose parameters have the names of the standard encoder."""
    return model.model if isinstance(model, LinearizedEncoder) else model


def predicate_of(which: str, model: nn.Module) -> Predicate:
    """The predicate of a subset: of `TRAINABLE`, `last:K`, or a regular expression.

    Args:
        which: the subset.
        model: the model that it is applied to, for its blocks.

    Raises:
        UsageError: for an invalid expression, or more blocks than there are.
    """
    if which in TRAINABLE:
        return TRAINABLE[which]
    if which.partition(":")[0] == "last":
        return last(_whole(which, which.partition(":")[2], "last:K, K a number of blocks"), model)
    try:
        pattern = re.compile(which)
    except re.error as error:
        raise UsageError(
            f"--trainable: expected {_choices()}, got {shown(which)} ({error})"
        ) from error
    return lambda name, modules: pattern.search(name) is not None


def train_only(model: nn.Module, which: str) -> None:
    """Freezes, in place, all but the parameters of a subset, see `predicate_of`.

    Names are those of the standard encoder, also in a linearised one.

    Raises:
        UsageError: if there are none.
    """
    model = bare(model)
    predicate = predicate_of(which, model)
    try:
        select(model, predicate)
    except ValueError as error:
        raise UsageError(_nothing(which, model)) from error


def _nothing(which: str, model: nn.Module) -> str:
    """The message for a choice that no parameter of a model matches."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    examples = ", ".join(names[:: max(1, len(names) // 6)])
    return (
        f"--trainable={shown(which)} matches none of the {len(names)} parameters; choose "
        f"{_choices()}; names are such as {examples}"
    )


def _choices() -> str:
    return f"{', '.join((*TRAINABLE, *FORMS))} or a regular expression of parameters' names"


def last(count: int, model: nn.Module) -> Predicate:
    """The last blocks of a tower, and what comes after them.

    Args:
        count: how many blocks.
        model: the tower.

    Raises:
        UsageError: if there are fewer.
    """
    blocks = blocks_of(model)
    if count > len(blocks):
        kinds = ", ".join(sorted({type(module).__name__ for _, module in blocks})) or "none"
        raise UsageError(
            f"--trainable=last:{count}: expected at most {len(blocks)}, the blocks of the model "
            f"({kinds}); choose fewer, or a regular expression of parameters' names"
        )
    names = after_block(model, blocks[-count][0])
    return lambda name, modules: name in names


def _role(name: str, modules: Sequence[nn.Module]) -> str:
    """What the innermost module that tells makes of it: norm, attention or mlp; else ""."""
    if re.search("Norm", type(modules[-1]).__name__):
        return "norm"
    parts = ["", *name.split(".")[:-1]]
    for part, module in reversed(list(zip(parts, modules, strict=True))):
        kind = type(module).__name__
        if re.search(ATTENTION, kind):
            return "attention"
        if re.search(MLP, kind) or re.search(MLP_NAMES, part):
            return "mlp"
    return ""


@TRAINABLE.register("all")
def everything(name: str, modules: Sequence[nn.Module]) -> bool:
    """All parameters."""
    return True


@TRAINABLE.register("attention")
def attention(name: str, modules: Sequence[nn.Module]) -> bool:
    """Attention layers, recognised by class: `MultiheadAttention`, `Attention` and so on."""
    return _role(name, modules) == "attention"


@TRAINABLE.register("attention-weights")
def attention_weights(name: str, modules: Sequence[nn.Module]) -> bool:
    """The query, key, value and output matrices of attention layers (arXiv:2407.07089)."""
    leaf, owner = name.rpartition(".")[2], modules[-1]
    linear = (
        isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d) or type(owner).__name__ == "Conv1D"
    )
    matrix = leaf == "weight" if linear else bool(re.fullmatch(r"(in|[qkv])_proj_weight", leaf))
    return matrix and attention(name, modules)


@TRAINABLE.register("mlp")
def mlp(name: str, modules: Sequence[nn.Module]) -> bool:
    """The feed-forward layers of transformers and their kin, recognised by class and name."""
    return _role(name, modules) == "mlp"


@TRAINABLE.register("norm")
def norm(name: str, modules: Sequence[nn.Module]) -> bool:
    """Weights and biases of normalisation layers."""
    return _role(name, modules) == "norm"


@TRAINABLE.register("norm_and_bias")
def norm_and_bias(name: str, modules: Sequence[nn.Module]) -> bool:
    """Biases, and weights of normalisation layers."""
    return name.rpartition(".")[2].endswith("bias") or norm(name, modules)
