"""A pool's task vectors, compressed: a model per task, and the bits that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tangent_arithmetic.merging.compressing import Code
from tangent_arithmetic.merging.compressions import COMPRESSIONS
from tangent_arithmetic.merging.pool import Model, ModelPool
from tangent_arithmetic.merging.registry import Method, Piece
from tangent_arithmetic.merging.stream import Merge, merged_state
from tangent_arithmetic.runtime.errors import unknown


@dataclass(frozen=True)
class Reconstruction:
    """A model from compressed weights.

    Attributes:
        state: theta0 plus the decoded task vector.
        bits: the bits that are stored for this task.
        shared: the bits that are stored once for all tasks, beside theta0.
    """

    state: dict[str, Tensor]
    bits: int
    shared: int


class Compressed:
    """The task vectors of a pool, compressed.

    Args:
        pool: the models, with the pre-trained one, which is stored as it is: a pool, or name ->
            model as for `ModelPool`.
        name: the compression.
        **options: options of the compression; the others have their defaults.

    Raises:
        UsageError: for an unknown compression or option.
    """

    def __init__(self, pool: ModelPool | Mapping[str, Model], name: str, **options: Any) -> None:
        self.pool, self.compression = ModelPool.of(pool), COMPRESSIONS[name]
        self.options = self.compression.options(options)

    def reconstruct(self, model: str) -> Reconstruction:
        """The model of a task, in memory.

        Args:
            model: the name of the model in the pool.

        Raises:
            UsageError: if no model has this name, the models do not match each other, or weights
                are not finite.
        """
        codes: dict[tuple[str, int], tuple[int, int]] = {}  # of each piece; a tied one is met twice

        def note(piece: Piece, code: Code) -> None:
            codes[piece.name, piece.start] = code.bits, code.shared

        state = merged_state(self.merge(model, note))
        own, shared = (sum(sizes) for sizes in zip((0, 0), *codes.values(), strict=True))
        return Reconstruction(state, own + self.compression.header, shared)

    def merge(self, model: str, note: Any = None) -> Merge:
        """The reconstruction as a merge, not yet computed, for `save_merged`.

        Args:
            model: the name of the model in the pool.
            note: called with each piece and its code.
        """
        if model not in self.pool.model_names:
            raise unknown("model", model, self.pool.model_names)
        index, own = self.pool.model_names.index(model), self.compression

        def decoded(piece: Piece, **arguments: Any) -> Tensor:
            code: Code = own.function(piece, index, **arguments)
            if note is not None:
                note(piece, code)
            return piece.base + code.tau

        method = Method(
            name=f"{own.name} of {model}",
            function=decoded,
            source=own.source,
            algorithm="",
            config="",
            prepare=own.prepare and partial(own.prepare, index=index),
            whole=own.whole,
            drops=True,
            defaults=own.defaults,
            types=own.types,
        )
        return Merge(self.pool, method, self.options)
