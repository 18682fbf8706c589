r"""TSV-C: each task keeps the largest singular values of its own matrices."""

from __future__ import annotations

from collections.abc import Sequence

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.compressing import Code, compression, size_of
from tangent_arithmetic.merging.registry import Piece


@compression("tsv_c", source="arXiv:2412.00081", whole=True)
def tsv_c(piece: Piece, index: int, *, exclude_keys: Sequence[str] | None = None) -> Code:
    r"""\(\hat\tau_t = U_t \Sigma_t V_t^\top\) with the largest singular values, matrix by matrix.

    Of a matrix of size m x n, \(k = \lfloor \min(m, n) / T \rfloor\) stay, at least one, as in
    `tsv_m`, and are stored as k (m + n + 1) numbers; a singular value of 0 is not stored. A matrix
    whose factors are as large as itself, and tensors that are not spectral, see
    `merging.spectral`, are stored as they are.

    Args:
        piece: one tensor of every model.
        index: t.
        exclude_keys: further tensors to store as they are.

    Source: Gargiulo et al., "Task Singular Vectors", arXiv:2412.00081.
    """
    tau = piece.tau(index)
    if not spectral.is_spectral(piece, exclude_keys):
        return Code(tau, bits=size_of(tau))
    rank = max(1, min(piece.shape) // len(piece.thetas))
    matrix = tau.view(piece.shape).double()
    parts = spectral.svd(matrix, spectral.precision(piece), rank)
    u, s, vt = (part.to(tau.dtype) for part in parts)
    bits = size_of(u, s, vt)
    if bits >= size_of(tau):
        return Code(tau, bits=size_of(tau))
    return Code(((u * s) @ vt).reshape(-1), bits=bits)
