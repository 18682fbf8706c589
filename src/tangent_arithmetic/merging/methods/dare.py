r"""DARE: drop weights of each task vector at random, rescale the rest, then merge.

The masks depend on (seed, model, tensor) only, not on the machine, the order of the files, the
number of threads or the size of the pieces: each `MASK_BLOCK` of a tensor has its own generator.
The paper and fusion-bench rescale by \(1 / (1 - p)\), as here; mergekit restores the L1 norm of the
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tangent_arithmetic.merging.gram import combine
from tangent_arithmetic.merging.methods.weighted_average import shares
from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method, one_per_model
from tangent_arithmetic.merging.seeds import generator_of
from tangent_arithmetic.merging.spectral import POSITIONS, TOKENS, module_of
from tangent_arithmetic.merging.trimming import Elected, elect, merge_rows
from tangent_arithmetic.runtime.errors import UsageError

MASK_BLOCK = 2**18  # numbers; the masks depend on it


def uniform(seed: int, model: str, name: str, start: int, size: int) -> Tensor:
    """Random numbers in [0, 1) for a piece of a model's tensor, shape (size,), in float32."""
    parts = [torch.zeros(0, dtype=torch.float32)]
    end = start + size
    for first in range(start - start % MASK_BLOCK, end, MASK_BLOCK):
        generator = generator_of(seed, model, name, first)
        count = min(MASK_BLOCK, end - first)
        numbers = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
        parts.append(numbers[max(0, start - first) :])
    return torch.cat(parts)


def is_linear_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight matrix of a linear layer, judged by its name and shape."""
    embeds = "embed" in name.lower() or module_of(name) in (*TOKENS, *POSITIONS)
    return len(shape) == 2 and name.endswith(".weight") and not embeds


def dropped(
    piece: Piece,
    sparsity_ratio: float,
    only_on_linear_weights: bool,
    rescale: bool,
    seed: int,
    **_others: Any,
) -> Iterator[Tensor]:
    """The pieces of the task vectors with a random share of their weights set to 0.

    Raises:
        UsageError: if `sparsity_ratio` is not in [0, 1).
    """
    if not 0 <= sparsity_ratio < 1:
        raise UsageError(f"sparsity_ratio must be at least 0 and below 1, got {sparsity_ratio}")
    if only_on_linear_weights and not is_linear_weight(piece.name, piece.shape):
        yield from piece.taus()
        return
    for model, tau in zip(piece.models, piece.taus(), strict=True):
        numbers = uniform(seed, model, piece.name, piece.start, len(tau)).to(tau.device)
        kept = tau * (numbers >= sparsity_ratio)
        yield kept / (1 - sparsity_ratio) if rescale else kept


@merging_method(
    "dare_task_arithmetic",
    source="arXiv:2311.03099",
    algorithm="DareTaskArithmetic",
    config="dare/task_arithmetic",
    drops=True,
)
def dare_task_arithmetic(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    sparsity_ratio: float = 0.5,
    only_on_linear_weights: bool = False,
    rescale: bool = True,
    seed: int = 0,
    weights: float | Sequence[float] = 1.0,
    normalize: bool = False,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda \sum_t w_t m_t \odot \tau_t / (1 - p)\).

    Args:
        piece: one piece of every model.
        scaling_factor: lambda.
        sparsity_ratio: p, the probability that a weight is dropped (m is 0).
        only_on_linear_weights: drop only weights of linear layers, see `is_linear_weight`.
        rescale: divide by 1 - p.
        seed: seed of the masks m.
        weights: w, one for all task vectors or one per model.
        normalize: divide the weights by their sum.

    Source: Yu et al., "Language Models are Super Mario", arXiv:2311.03099, section 3.
    """
    parts = dropped(piece, sparsity_ratio, only_on_linear_weights, rescale, seed)
    factors = shares(
        tuple(one_per_model(weights, piece.models, "weights")), normalize, piece.models
    )
    return combine(list(parts), factors).mul_(scaling_factor).add_(piece.base)


def prepare(pieces: Pieces, **options: Any) -> Elected:
    """Thresholds and majority sign of the task vectors after dropping."""
    return elect(pieces, lambda piece: dropped(piece, **options), **options)


@merging_method(
    "dare_ties",
    source="arXiv:2311.03099",
    algorithm="DareTiesMerging",
    config="dare/ties_merging",
    prepare=prepare,
    passes=4,
    drops=True,
)
def dare_ties(
    piece: Piece,
    *,
    scaling_factor: float = 0.5,
    sparsity_ratio: float = 0.5,
    only_on_linear_weights: bool = False,
    rescale: bool = True,
    threshold: float = 20,
    remove_keys: Sequence[str] = (),
    merge_func: Literal["sum", "mean", "max"] = "sum",
    scope: Literal["global", "tensor"] = "global",
    zero_sign: Literal["majority", "positive"] = "majority",
    seed: int = 0,
    weights: float | Sequence[float] = 1.0,
    statistics: Elected,
) -> Tensor:
    """`ties` applied after the dropping of `dare_task_arithmetic`, with the options of both.

    Source: Yu et al., "Language Models are Super Mario", arXiv:2311.03099, section 4.
    """
    if piece.name in remove_keys:
        return piece.base.clone()
    parts = dropped(piece, sparsity_ratio, only_on_linear_weights, rescale, seed)
    trimmed = statistics.trimmed(piece.name, parts)
    factors = one_per_model(weights, piece.models, "weights")
    merged = merge_rows(trimmed, factors, merge_func, statistics.zero_sign)
    return merged.mul_(scaling_factor).add_(piece.base)
