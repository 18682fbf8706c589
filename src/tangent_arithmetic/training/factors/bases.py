"""Leading eigenvectors: of a symmetric matrix, given or as S S^T, and of a sum of directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

DENSE_SIDE = 1024  # matrices up to this size are decomposed in full
SPARE, ITERATIONS = 16, 6  # of the subspace iteration for larger ones
ITERATIONS_OF_ROOT = 2  # given S, which is better conditioned


def leading(matrix: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n r"]:
    """The leading eigenvectors of a positive semi-definite matrix, at most `rank`, in order."""
    rank = min(rank, len(matrix))
    if len(matrix) <= max(DENSE_SIDE, 2 * rank):
        vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors.flip(1)
        return vectors[:, :rank].contiguous()
    return _iterated(matrix, rank, ITERATIONS)


def leading_of_root(root: Float[Tensor, "n k"], rank: int) -> Float[Tensor, "n r"]:
    """The leading eigenvectors of S S^T, at most `rank` and, of a large one, k."""
    if len(root) <= DENSE_SIDE:
        return leading(root @ root.mT, rank)
    return _iterated(root, min(rank, root.shape[1]), ITERATIONS_OF_ROOT)


def _iterated(matrix: Float[Tensor, "n k"], rank: int, iterations: int) -> Float[Tensor, "n r"]:
    """Leading left singular vectors by a subspace iteration from fixed random numbers."""
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        spare = min(rank + SPARE, *matrix.shape)
        vectors: Tensor = torch.svd_lowrank(matrix, spare, niter=iterations)[0]
    return vectors[:, :rank].contiguous()


def compress(
    rows: Sequence[Float[Tensor, "k _"]], signs: Float[Tensor, " k"], count: int
) -> list[Float[Tensor, "r _"]]:
    r"""The `count` leading directions V of \(\sum_k s_k w_k w_k^\top \approx V^\top V\).

    Args:
        rows: w, in parts that are joined along their last dimension.
        signs: s, 1 or -1; what is negative in the sum is left out.
        count: the number of directions.

    Returns:
        V in the same parts.
    """
    gram = sum((part @ part.mT for part in rows[1:]), rows[0] @ rows[0].mT)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.amax().clamp(min=0) * torch.finfo(values.dtype).eps * len(values)
    values, vectors = values[kept], vectors[:, kept]
    root = values.sqrt()  # w = basis * (root vectors^T), with an orthonormal basis
    inner = (root[:, None] * vectors.mT * signs) @ (vectors * root)
    sizes, turned = torch.linalg.eigh(inner)
    order = sizes.argsort(descending=True)[:count]
    order = order[sizes[order] > 0]
    weights = vectors @ (turned[:, order] * sizes[order].sqrt()[None] / root[:, None])
    return [weights.mT @ part for part in rows]
