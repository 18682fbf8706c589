r"""KnOTS: the task vectors of a matrix in one basis of their common column space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.merging.spaces import Lift, merge_in, prepare_in


def aligned(piece: Piece) -> tuple[list[Tensor], Lift] | None:
    r"""\(\Sigma V_t^\top = U^\top \tau_t\) of each task, and the way back."""
    matrices = list(spectral.matrices(piece))
    u, s, _ = spectral.svd(torch.cat(matrices, dim=1), spectral.precision(piece))
    if not len(s):
        return None
    return [u.mT @ matrix for matrix in matrices], u.__matmul__


@merging_method(
    "knots",
    source="arXiv:2410.19735",
    whole=True,
    drops=True,
    prepare=partial(prepare_in, space=aligned),
    passes=4,
    of_outputs=True,
)
def knots(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    inner: str = "ties",
    inner_options: Mapping[str, Any] | None = None,
    exclude_keys: Sequence[str] | None = None,
    statistics: Any,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda\, U\, m(\Sigma V_1^\top, \dots, \Sigma V_T^\top)\).

    \(U \Sigma [V_1^\top \dots V_T^\top]\) is the singular value decomposition of \([\tau_1 \dots
    \tau_T]\), the task vectors of a matrix side by side. Tensors that are not spectral, see
    `merging.spectral`, become \(\theta_0 + \lambda\) times the mean of the task vectors.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda; the authors' configuration for rank 16 and ViT-B/32 has 0.6.
        inner: the method m that merges the \(\Sigma V_t^\top\); TIES, and DARE with TIES, in the
            paper.
        inner_options: its options; the authors have {threshold: 20, merge_func: mean}, with a
            threshold over the coordinates of all matrices.
        exclude_keys: further tensors to average.
        statistics: the result of `prepare_in`.

    Source: Stoica et al., "Model Merging with SVD to Tie the KnOTS", arXiv:2410.19735, section 4.
    """
    return merge_in(
        piece,
        space=aligned,
        scaling_factor=scaling_factor,
        inner=inner,
        inner_options=inner_options,
        exclude_keys=exclude_keys,
        statistics=statistics,
    )
