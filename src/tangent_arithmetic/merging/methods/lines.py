r"""LiNeS: task arithmetic whose coefficient grows linearly with the depth of the layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.merging.spectral import mean_tau


def block_of(name: str) -> tuple[str, int] | None:
    """The list of blocks that a tensor belongs to and its index there; None outside of blocks.

    The index is the first number in the name: 3 in "encoder.layers.3.mlp.fc1.weight".
    """
    words = name.split(".")
    for i, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[:i]), int(word)
    return None


def depths(names: Collection[str]) -> dict[str, float]:
    """The depth of each tensor: 0 in the first block of its list and outside, 1 in the last."""
    blocks = {name: block for name in names if (block := block_of(name)) is not None}
    indices: dict[str, set[int]] = {}
    for stack, index in blocks.values():
        indices.setdefault(stack, set()).add(index)
    depth = {
        (stack, index): rank / max(1, len(within) - 1)
        for stack, within in indices.items()
        for rank, index in enumerate(sorted(within))
    }
    return {name: depth[blocks[name]] if name in blocks else 0.0 for name in names}


def growth(num_tasks: int, beta: float, depth: float) -> float:
    """The coefficient of a tensor divided by that of the first block, 1 / num_tasks."""
    return 1 + num_tasks * beta * depth


def prepare(pieces: Pieces, **_options: Any) -> dict[str, float]:
    """The depth of each tensor."""
    return depths({piece.name for piece in pieces()})


@merging_method(
    "lines_task_arithmetic",
    source="arXiv:2410.17146",
    prepare=prepare,
    passes=2,
    coefficient="beta",
    scales=False,
)
def lines_task_arithmetic(
    piece: Piece, *, beta: float = 0.5, statistics: dict[str, float]
) -> Tensor:
    r"""\(\theta = \theta_0 + (\alpha + \beta \frac{l - 1}{L - 1}) \sum_t \tau_t\) in block l of L.

    \(\alpha = 1 / T\), the coefficient of the mean, which tensors outside of the blocks have, and
    those of the first one. The paper's \(\alpha\) for another merged vector is the norm of the sum
    divided by T and by the norm of that vector.

    Args:
        piece: one piece of every model.
        beta: what the last block has beyond alpha; the paper chooses it on validation.
        statistics: the result of `prepare`.

    Source: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
    Merging", arXiv:2410.17146, sections 4 and 5.2.
    """
    factor = growth(len(piece.thetas), beta, statistics[piece.name])
    return mean_tau(piece).mul_(factor).add_(piece.base)
