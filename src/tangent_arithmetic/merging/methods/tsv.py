r"""TSV-M: task singular vectors, truncated, decorrelated and put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, merging_method, one_per_model


def decorrelated(matrices: Iterable[Tensor], num_models: int, eps: float) -> Tensor:
    r"""\(U_\perp \Sigma V_\perp^\top\) of matrices of one shape, see `tsv_m`."""
    parts = []
    for matrix in matrices:
        rank = max(1, min(matrix.shape) // num_models)
        parts.append(spectral.svd(matrix, eps, rank))
    u, s, vt = spectral.join(parts)
    (u, _), (vt, _) = spectral.polar(u, eps), spectral.polar(vt, eps)
    return (u * s) @ vt


@merging_method(
    "tsv_m",
    source="arXiv:2412.00081",
    algorithm="TaskSingularVectorMerging",
    config="task_singular_vector/TaskSingularVectorMerging",
    whole=True,
    coefficient="alpha",
)
def tsv_m(
    piece: Piece, *, alpha: float | Sequence[float] = 1.0, exclude_keys: Sequence[str] | None = None
) -> Tensor:
    r"""\(\theta = \theta_0 + \alpha\, U_\perp \Sigma V_\perp^\top\), matrix by matrix.

    Of each \(\tau_t = U_t \Sigma_t V_t^\top\) of size m x n, the largest \(k = \lfloor \min(m, n)
    / T \rfloor\) singular values stay (at least one). \(\Sigma\) holds those of all tasks,
    \(U_\perp\) and \(V_\perp\) are the matrices with orthonormal columns nearest to \([U_1 \dots
    U_T]\) and \([V_1 \dots V_T]\). Tensors that are not spectral, see `merging.spectral`, become
    \(\theta_0 + \alpha\) times the mean of the task vectors.

    Args:
        piece: one tensor of every model.
        alpha: the scaling factor, or one per model.
        exclude_keys: further tensors to average.

    Source: Gargiulo et al., "Task Singular Vectors", arXiv:2412.00081, section 4.2 and algorithm 1.
    """
    factors = one_per_model(alpha, piece.models, "tsv_m's alpha")
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece, factors).add_(piece.base)
    scaled = (m.mul_(f) for m, f in zip(spectral.matrices(piece), factors, strict=True))
    merged = decorrelated(scaled, len(factors), spectral.precision(piece))
    return merged.view(-1).to(piece.base.dtype).add_(piece.base)
