r"""LiNeS before any method: task vectors that grow linearly with the depth of the layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tangent_arithmetic.merging.methods.lines import growth, prepare
from tangent_arithmetic.merging.registry import PRETRAINED, Piece, plugin


@plugin("lines", source="arXiv:2410.17146", prepare=prepare)
def lines(piece: Piece, *, beta: float = 0.5, statistics: dict[str, float]) -> Iterator[Tensor]:
    r"""\(\hat\tau_t = (1 + T \beta \frac{l - 1}{L - 1})\, \tau_t\) in block l of L.

    Blocks are those of `lines_task_arithmetic`, of which the mean after this plug-in is the result:
    its coefficients divided by \(\alpha = 1 / T\), the first of them. The paper scales the merged
    vector instead, and divides by its norm relative to the sum's; both are the same, up to one
    factor for all tensors, for methods that treat each tensor by itself and scale with it, such as
    Iso-C, but not for thresholds over the whole vector (`ties`, `pcb_merging`), nor where
    the models themselves are merged (`karcher`).

    Args:
        piece: one piece of every model.
        beta: what the last block has beyond alpha; the paper chooses it on validation.
        statistics: the result of `prepare`.

    Source: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
    Merging", arXiv:2410.17146, sections 4 and 5.2.
    """
    num_tasks = sum(model != PRETRAINED for model in piece.models)
    factor = growth(num_tasks, beta, statistics[piece.name])
    return (tau.mul_(factor) for tau in piece.taus())
