r"""LoRA, and L-LoRA: its linearisation in the adapters alone.

\[ W = W_0 + s\, B A, \quad B = 0 \text{ at the start} \]

Standard models train A and B. The linearisation of a model in (A, B) at (A_0, 0) has no derivative
in A, and that in B is the dense one along \(s\, dB\, A_0\): linear models train B alone, in the
dense linearisation, which is the same function. Either way a checkpoint holds dense weights; the
adapters are kept beside it in PEFT's format (`adapters.py`).

Source: LoRA, arXiv:2106.09685; L-LoRA, Tang et al., arXiv:2310.04742.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.reparametrised import Part, reparametrise
from tangent_arithmetic.training.trainable import bare, enclosing, predicate_of

if TYPE_CHECKING:
    from jaxtyping import Float

SCALE = 2.0  # s: lora_alpha is twice the rank
STREAM = 19  # of random numbers, apart from those of training


class LowRank(Part):
    r"""\(W_0 + s\, B A\), kernels of convolutions flattened to (out, rest).

    Args:
        shape: of the weight.
        rank: rows of A.
        generator: of A, uniform with variance 1 / (3 columns), as in PEFT; B is zero.
        train_a: whether A is trained as well.
    """

    def __init__(
        self, shape: torch.Size, rank: int, generator: torch.Generator, train_a: bool = True
    ) -> None:
        super().__init__()
        columns = math.prod(shape[1:])
        a = torch.empty(rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
        if train_a:
            self.a = nn.Parameter(a)
        else:
            self.register_buffer("a", a)
        self.b = nn.Parameter(torch.zeros(shape[0], rank))

    def value(self, start: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The weight."""
        step = SCALE * (self.b @ self.a)
        return start + step.view_as(start).to(start.dtype)


def targets(encoder: ModuleEncoder, which: str) -> list[str]:
    """The names of the matrices of a subset that can have adapters, as in the standard encoder.

    These are weights of linear layers and convolutions, and the projections of
    `nn.MultiheadAttention`; biases, norms and embeddings have none.

    Args:
        encoder: the encoder, standard or linearised.
        which: a subset, see `trainable.predicate_of`.

    Raises:
        UsageError: if there are none.
    """
    model = bare(encoder)
    predicate = predicate_of(which, model)
    names = []
    for name, parameter in model.named_parameters():
        modules = enclosing(model, name)
        if parameter.requires_grad and _adaptable(name, modules) and predicate(name, modules):
            names.append(name)
    if not names:
        raise UsageError(
            f"--trainable=lora:R:{which}: no matrix of the model that can have adapters matches "
            f"{which}; choose another subset, such as lora:R:mlp or lora:R:all"
        )
    return names


def _adaptable(name: str, modules: Sequence[nn.Module]) -> bool:
    """Whether PEFT has adapters for a parameter."""
    leaf, owner, outer = name.rpartition(".")[2], modules[-1], modules[-2:][0]
    if isinstance(owner, nn.MultiheadAttention):
        return leaf == "in_proj_weight"
    if leaf != "weight" or not isinstance(owner, nn.Linear | nn.Conv2d):
        return False
    if isinstance(outer, nn.MultiheadAttention):
        return bool(outer._qkv_same_embed_dim)
    return isinstance(owner, nn.Linear) or owner.groups == 1


def adapted(
    encoder: ModuleEncoder, rank: int, which: str = "attention-weights", seed: int = 0
) -> ModuleEncoder:
    """The encoder to train with adapters in place of one, with the same features at first.

    Args:
        encoder: a standard encoder, or a linearised one at theta0; the latter trains B alone.
        rank: of the adapters.
        which: the subset whose matrices have adapters, see `targets`.
        seed: of A.

    Raises:
        UsageError: if there is no such matrix, the rank exceeds that of the largest of them, or
            PEFT is not installed.
    """
    check_peft()
    linear = isinstance(encoder, LinearizedEncoder)
    generator = torch.Generator().manual_seed((seed << 8) + STREAM)
    weights = dict(bare(encoder).named_parameters())
    shapes = {name: weights[name].shape for name in targets(encoder, which)}
    full = max(min(shape[0], math.prod(shape[1:])) for shape in shapes.values())
    if rank > full:
        raise UsageError(
            f"--trainable=lora:{rank}: expected a rank of at most {full}, the full rank of the "
            f"largest of {len(shapes)} matrices; train them whole with --trainable={which}"
        )
    device = next(iter(weights.values())).device
    parts = {name: LowRank(s, rank, generator, not linear) for name, s in shapes.items()}
    return reparametrise(encoder, {name: part.to(device) for name, part in parts.items()})


def check_peft() -> None:
    """Raises a `UsageError` if PEFT is not installed, without importing it."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError("adapters need PEFT; install it: pip install peft")
