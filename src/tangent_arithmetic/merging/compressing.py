r"""Compressions of task vectors: their form, and the table of them.

A compression stores each task vector in fewer bits, and gives back one model per task. It therefore
needs to know an image's task at test time, and is no merging method: it is reported by itself.

Its function encodes and decodes one piece of one task's vector, see `merging.registry.Piece`, and
counts the bits of what it stores:

    @compression("signs", source="none")
    def signs(piece: Piece, index: int) -> Code:
        tau = piece.tau(index)
        return Code(tau.sign(), bits=2 * len(tau))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tangent_arithmetic.merging.options import Registered, signature
from tangent_arithmetic.merging.registry import Piece
from tangent_arithmetic.runtime.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

BYTE = 8  # bits


@dataclass(frozen=True)
class Code:
    """One piece of a compressed task vector.

    Attributes:
        tau: what it decodes to.
        bits: the bits that are stored for this task.
        shared: the bits that are stored once for all tasks.
    """

    tau: Tensor
    bits: int
    shared: int = 0


Encoder = TypeVar("Encoder", bound=Callable[..., Code])


@dataclass(frozen=True, eq=False, kw_only=True)
class Compression(Registered):
    """A registered compression.

    Its function takes (piece, index, **options[, statistics]) and returns a `Code` of the task
    vector with this index; its `prepare` takes (pieces, index, **options).

    Attributes:
        whole: whether its pieces must be whole tensors.
        header: the bits of a task beside those of its tensors.
    """

    whole: bool = False
    header: int = 0


COMPRESSIONS: Registry[Compression] = Registry("compression")


def compression(name: str, *, source: str, **facts: Any) -> Callable[[Encoder], Encoder]:
    """Registers a function as a compression; its keyword arguments are its options.

    Args:
        name: the name of the compression.
        source: the paper that defines it.
        **facts: the other attributes of `Compression`.
    """

    def register(function: Encoder) -> Encoder:
        derived = {**signature(function), **facts}
        COMPRESSIONS[name] = Compression(name=name, function=function, source=source, **derived)
        return function

    return register


def size_of(*tensors: Tensor) -> int:
    """The bits of tensors as they are."""
    return BYTE * sum(tensor.nbytes for tensor in tensors)


def width_of(piece: Piece) -> int:
    """The bits of a number of a piece: 32, or 64 for models in double precision."""
    return BYTE * piece.base.itemsize
