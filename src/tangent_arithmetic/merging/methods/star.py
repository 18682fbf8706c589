r"""STAR: spectral truncation of each task vector, and rescaling to its nuclear norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError


def truncated(matrix: Tensor, eta: float, eps: float) -> Tensor:
    """A matrix with its largest singular values only, stretched to the nuclear norm of all."""
    u, s, vt = spectral.svd(matrix, eps)
    if not len(s):
        return torch.zeros_like(matrix)
    upto = s.cumsum(0)
    # the sum of all may exceed the last of `upto` by rounding
    rank = min(len(s), int(torch.searchsorted(upto, upto[-1] * eta / 100)) + 1)
    return (u[:, :rank] * (s[:rank] * (upto[-1] / upto[rank - 1]))) @ vt[:rank]


@merging_method("star", source="arXiv:2502.10339", whole=True)
def star(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    eta: float = 40,
    exclude_keys: Sequence[str] | None = None,
) -> Tensor:
    r"""\(\theta = \theta_0 + \frac{\lambda}{T} \sum_t U_t \hat\Sigma_t V_t^\top\), by matrix.

    Of each \(\tau_t = U_t \Sigma_t V_t^\top\), the fewest singular values stay whose sum is at
    least eta percent of the nuclear norm; they are multiplied by the nuclear norm divided by their
    sum. Other tensors become \(\theta_0 + \lambda\) times the mean of the task vectors, see
    `merging.spectral`.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda; the paper has 1.
        eta: percentage of the nuclear norm to keep.
        exclude_keys: further tensors to average.

    Source: Lee et al., "STAR: Spectral Truncation and Rescale for Model Merging",
    arXiv:2502.10339.
    """
    if not 0 < eta <= 100:
        raise UsageError(f"star's eta must be above 0 and at most 100 (percent), got {eta}")
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    total = torch.zeros(piece.shape, dtype=torch.float64, device=piece.base.device)
    for matrix in spectral.matrices(piece):
        total += truncated(matrix, eta, spectral.precision(piece))
    total *= scaling_factor / len(piece.thetas)
    return total.view(-1).to(piece.base.dtype).add_(piece.base)
