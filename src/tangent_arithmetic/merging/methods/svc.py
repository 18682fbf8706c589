r"""SVC: singular values of a merged matrix that several tasks have raised are lowered again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.merging.spaces import method_of, options_of
from tangent_arithmetic.runtime.errors import UsageError


def prepare(
    pieces: Pieces, *, inner: str, inner_options: Mapping[str, Any] | None, **_others: Any
) -> Any:
    """What the inner method prepares; None if nothing."""
    merger = method_of(inner)
    options = options_of(merger, inner_options, unscaled=False)
    return None if merger.prepare is None else merger.prepare(pieces, **options)


def calibrated(merged: Tensor, matrices: Iterable[Tensor], alpha: float, eps: float) -> Tensor:
    """A merged matrix with calibrated singular values, see `svc`; all in float64."""
    u, s, vt = spectral.svd(merged, eps)
    if not len(s):
        return merged
    response, total, number = s[:, None] * vt, torch.zeros_like(s), 0
    for matrix in matrices:
        own = u.mT @ matrix
        squares = own.square().sum(dim=1)
        aligned = (response * own).sum(dim=1) / torch.where(squares > 0, squares, 1.0)
        total += aligned.clamp(min=alpha)
        number += 1
    return (u * (s * number / total)) @ vt


@merging_method(
    "svc", source="arXiv:2602.05536", whole=True, drops=True, prepare=prepare, of_outputs=True
)
def svc(
    piece: Piece,
    *,
    alpha: float = 0.1,
    inner: str = "task_arithmetic",
    inner_options: Mapping[str, Any] | None = None,
    exclude_keys: Sequence[str] | None = None,
    statistics: Any,
) -> Tensor:
    r"""\(\theta = \theta_0 + \sum_r \gamma_r \sigma_r u_r v_r^\top\), matrix by matrix.

    \(\sum_r \sigma_r u_r v_r^\top\) is the task vector that another method merges. A task responds
    along \(u_r\) by \(a_r^t = u_r^\top \tau_t\), the merged vector by \(\sigma_r v_r^\top\), which
    has \(s_r^t = \sigma_r \langle v_r, a_r^t \rangle / \|a_r^t\|^2\) of the task's response; then
    \(\gamma_r = T / \sum_t \max(\alpha, s_r^t)\). Where a task does not respond, \(s_r^t\) is 0.
    Tensors that are not spectral, see `merging.spectral`, are those of the other method.

    Args:
        piece: one tensor of every model.
        alpha: the least share of a task's response that counts, above 0.
        inner: the other method.
        inner_options: its options.
        exclude_keys: tensors to leave as the other method merges them.
        statistics: the result of `prepare`.

    Source: "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging",
    arXiv:2602.05536, equations 4 and 8 and algorithm 1.
    """
    if not alpha > 0:
        raise UsageError(f"svc's alpha must be above 0, got {alpha}")
    merger = method_of(inner)
    arguments = options_of(merger, inner_options, unscaled=False)
    if merger.prepare is not None:
        arguments["statistics"] = statistics
    merged: Tensor = merger.function(piece, **arguments)
    if not spectral.is_spectral(piece, exclude_keys):
        return merged
    step = (merged - piece.base).view(piece.shape).double()
    found = calibrated(step, spectral.matrices(piece), alpha, spectral.precision(piece))
    return found.reshape(-1).to(piece.base.dtype).add_(piece.base)
