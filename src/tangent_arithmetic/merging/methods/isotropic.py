r"""Isotropic merging: the merged task vector of a matrix gets a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError


def summed(piece: Piece) -> Tensor:
    """The sum of the task vectors of a matrix, in float64."""
    matrices = spectral.matrices(piece)
    total = next(matrices)
    for matrix in matrices:
        total += matrix
    return total


def flattened(isometry: Tensor, s: Tensor) -> Tensor:
    """An isometry times the mean of singular values; 0 if there is none."""
    return isometry.mul_(s.mean() if len(s) else 0.0)


def added(piece: Piece, merged: Tensor, scaling_factor: float) -> Tensor:
    """theta0 plus a scaled matrix, flattened."""
    return merged.mul_(scaling_factor).view(-1).to(piece.base.dtype).add_(piece.base)


@merging_method(
    "iso_c",
    source="arXiv:2502.04959",
    algorithm="ISO_C_Merge",
    config="isotropic_merging/iso_c",
    whole=True,
    largest=3.0,
)
def iso_c(
    piece: Piece, *, scaling_factor: float = 1.0, exclude_keys: Sequence[str] | None = None
) -> Tensor:
    r"""\(\theta = \theta_0 + \alpha\, \bar\sigma\, U V^\top\), matrix by matrix.

    \(U \Sigma V^\top\) is the singular value decomposition of the sum of the task vectors,
    \(\bar\sigma\) the mean of its non-zero singular values. Tensors that are not spectral, see
    `merging.spectral`, become \(\theta_0 + \alpha\) times the mean of the task vectors.

    Args:
        piece: one tensor of every model.
        scaling_factor: alpha; the paper chooses it on validation, 0.8 to 1.5 by model and
            number of tasks.
        exclude_keys: further tensors to average.

    Source: Marczak et al., "No Task Left Behind", arXiv:2502.04959, section 4.
    """
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    parts = spectral.polar(summed(piece), spectral.precision(piece))
    return added(piece, flattened(*parts), scaling_factor)


@merging_method(
    "iso_cts",
    source="arXiv:2502.04959",
    algorithm="ISO_CTS_Merge",
    config="isotropic_merging/iso_cts",
    whole=True,
    largest=3.0,
    of_outputs=True,
)
def iso_cts(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    common_space_fraction: float = 0.8,
    exclude_keys: Sequence[str] | None = None,
) -> Tensor:
    r"""\(\theta = \theta_0 + \alpha\, \bar\sigma\, U_\perp V_\perp^\top\), matrix by matrix.

    U and V hold the k largest singular vectors of the sum of the task vectors and, for each task,
    the (r - k) / T largest of \((I - U U^\top) \tau_t\), with r = min(m, n). \(U_\perp\) and
    \(V_\perp\) are the nearest matrices with orthonormal columns, \(\bar\sigma\) is the mean of
    the singular values of all these vectors. Other tensors as in `iso_c`.

    Args:
        piece: one tensor of every model.
        scaling_factor: alpha; the paper chooses it on validation, 1.1 to 1.9 by model and
            number of tasks.
        common_space_fraction: k / r; k is then rounded so that T divides r - k, as in
            fusion-bench.
        exclude_keys: further tensors to average.

    Source: Marczak et al., "No Task Left Behind", arXiv:2502.04959, section 4.
    """
    if not 0 <= common_space_fraction <= 1:
        raise UsageError(
            f"iso_cts's common_space_fraction must be from 0 to 1, got {common_space_fraction}"
        )
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    eps, rank, num_models = spectral.precision(piece), min(piece.shape), len(piece.thetas)
    own = round((rank - int(rank * common_space_fraction)) / num_models)
    own = min(own, rank // num_models)
    common = spectral.svd(summed(piece), eps, rank - own * num_models)
    parts, basis = [common], common[0]
    for matrix in spectral.matrices(piece) if own else ():
        rest = matrix - basis @ (basis.mT @ matrix)
        parts.append(spectral.svd(rest, eps, own, size=float(matrix.norm())))
    u, s, vt = spectral.join(parts)
    (u, _), (vt, _) = spectral.polar(u, eps), spectral.polar(vt, eps)
    return added(piece, flattened(u @ vt, s), scaling_factor)
