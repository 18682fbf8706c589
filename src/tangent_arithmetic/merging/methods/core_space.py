r"""Core Space: the task vectors of a matrix as small cores between two common bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.merging.spaces import Lift, merge_in, prepare_in


def factors(piece: Piece) -> Iterator[tuple[Tensor, Tensor]]:
    """Two factors of each task vector: those of its adapter, or from its singular values."""
    if piece.factors is not None:
        yield from ((left.double(), right.double()) for left, right in piece.factors)
        return
    for matrix in spectral.matrices(piece):
        u, s, vt = spectral.svd(matrix, spectral.precision(piece))
        yield u * s.sqrt(), s.sqrt()[:, None] * vt


def cores(piece: Piece) -> tuple[list[Tensor], Lift] | None:
    r"""\(U^\top B_t A_t V\) of each task, and the way back."""
    pairs, eps = list(factors(piece)), spectral.precision(piece)
    u, left, _ = spectral.svd(torch.cat([b for b, _ in pairs], dim=1), eps)
    _, right, vt = spectral.svd(torch.cat([a for _, a in pairs]), eps)
    if not len(left) or not len(right):
        return None
    return [(u.mT @ b) @ (a @ vt.mT) for b, a in pairs], lambda core: u @ core @ vt


@merging_method(
    "core_space",
    source="arXiv:2509.17786",
    whole=True,
    drops=True,
    prepare=partial(prepare_in, space=cores),
    largest=3.0,
)
def core_space(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    inner: str = "tsv_m",
    inner_options: Mapping[str, Any] | None = None,
    exclude_keys: Sequence[str] | None = None,
    statistics: Any,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda\, U\, m(M_1, \dots, M_T)\, V^\top\).

    \(M_t = U^\top B_t A_t V\) with the left singular vectors U of \([B_1 \dots B_T]\) and the right
    singular vectors V of \([A_1; \dots; A_T]\), where \(\tau_t = B_t A_t\) are adapters with their
    scale in B. Of task vectors that are no adapters, or that a plug-in has changed, \(B_t\) and
    \(A_t\) are the singular vectors times the roots of the singular values. Tensors that are not
    spectral, see `merging.spectral`, become \(\theta_0 + \lambda\) times the mean of the task
    vectors.

    Nothing is lost on the way: of methods that do not depend on the basis (sums, TSV-M, Iso-C)
    the result is theirs, on smaller matrices. TIES and others that look at single numbers differ.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda.
        inner: the method m that merges the cores.
        inner_options: its options; the authors' TIES has {scope: tensor}.
        exclude_keys: further tensors to average.
        statistics: the result of `prepare_in`.

    Source: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space",
    arXiv:2509.17786, section 4.
    """
    return merge_in(
        piece,
        space=cores,
        scaling_factor=scaling_factor,
        inner=inner,
        inner_options=inner_options,
        exclude_keys=exclude_keys,
        statistics=statistics,
    )
