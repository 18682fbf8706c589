r"""Parameters as matrices: a weight with its bias as a last column, vectors as one column.

The gradient of an example in a layer is a matrix, \(G_n = \sum_t g_t a_t^\top\) for a dense layer
with inputs \(a_t\) (1 appended for the bias) at tokens t. Blocks know names and shapes only: they
fit convolutions, the packed projections of attention, embeddings and free parameters alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)

LARGEST_SIDE = 8192  # of a block that is decomposed; larger ones keep their diagonal


@dataclass(frozen=True)
class Block:
    """Parameters that are penalised together, as a matrix.

    Attributes:
        names: the parameters' names; of a matrix and its bias, or of vectors.
        shapes: their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """The name of its first parameter."""
        return self.names[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it holds a matrix; vectors are one column."""
        return len(self.shapes[0]) > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        if not self.is_matrix:
            return sum(sizes), 1
        rows = self.shapes[0][0]
        return rows, sizes[0] // rows + len(sizes) - 1

    def matrix(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*batch rows columns"]:
        """The block of named tensors of the parameters' shapes, dimensions before these kept."""
        first, *others = (tensors[name] for name in self.names)
        batch = first.shape[: first.dim() - len(self.shapes[0])]
        if not self.is_matrix:
            vectors = [value.reshape(*batch, -1, 1) for value in (first, *others)]
            return torch.cat(vectors, dim=-2)
        matrix = first.flatten(len(batch) + 1)
        return torch.cat([matrix, *(b[..., None] for b in others)], dim=-1) if others else matrix

    def parts(self, matrix: Float[Tensor, "rows columns"]) -> dict[str, Tensor]:
        """The tensors of a block, by name: the inverse of `matrix`."""
        if not self.is_matrix:
            sizes = [torch.Size(shape).numel() for shape in self.shapes]
            pieces = list(matrix.split(sizes))
        else:
            count = len(self.names) - 1
            whole = matrix.shape[1] - count
            pieces = [matrix[:, :whole], *(matrix[:, whole + i] for i in range(count))]
        named = zip(self.names, pieces, self.shapes, strict=True)
        return {name: piece.reshape(shape) for name, piece, shape in named}


def blocks_of(module: nn.Module) -> list[Block]:
    """The blocks of a module's parameters; those without a real gradient are left out and named."""
    left = dict[str, Tensor]()
    for name, value in module.named_parameters():
        if value.is_floating_point() and value.numel():
            left[name] = value
        else:
            logger.warning("%s: not penalised, since it has no real derivatives", name)
    blocks: list[Block] = []
    while left:
        name = next(iter(left))
        first = left[name].shape[:1]
        bias = name[: -len("weight")] + "bias" if name.endswith("weight") else ""
        together = [name]
        if bias in left and left[bias].shape == first != ():
            together.append(bias)
        blocks.append(Block(tuple(together), tuple(tuple(left.pop(n).shape) for n in together)))
    return blocks
