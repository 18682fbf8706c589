r"""ACE: a least-squares fit to all models on inputs whose covariance the task vectors estimate.

The rows of a task vector lie near the span of the task's inputs, so that their covariance stands
for that of the inputs, and the fit is RegMean's without data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError

HETEROGENEOUS = 0.3  # gamma above this: covariances are normalised, the spectrum refined


def spread(energies: Tensor) -> float:
    r"""\(\gamma\), the variance of the logarithms of squared norms, by their squared mean."""
    if len(energies) < 2:
        return 0.0
    logs = energies.log()
    return float(logs.var() / (logs.mean().square() + 1e-12))


def fitted(
    rows: Sequence[Tensor], covariances: Sequence[Tensor], ridges: Sequence[Tensor], prior: float
) -> Tensor:
    r"""\(W_0 = (\sum_t X_t \hat\Sigma_t) (\sum_t \hat\Sigma_t + C)^{-1}\), see `ace`."""
    total = torch.stack(tuple(covariances)).sum(dim=0)
    common = total.mean(dim=0, keepdim=True) * prior  # C, one row for all
    left, weight = torch.zeros_like(rows[0]), total + common
    for x, covariance, ridge in zip(rows, covariances, ridges, strict=True):
        left += x @ covariance + ridge * x
        weight.diagonal().add_(ridge)
    solution: Tensor = torch.linalg.solve(weight, left, left=False)
    return solution


def refined(
    start: Tensor, rows: Sequence[Tensor], covariances: Sequence[Tensor], mean: Tensor, share: float
) -> Tensor:
    r"""\(W_0\) plus the leading directions of its residuals with their mean singular value."""
    residual = start + sum(x @ (c - mean) for x, c in zip(rows, covariances, strict=True))
    u, s, vt = torch.linalg.svd(residual, full_matrices=False)
    kept = int(len(s) * share)
    return start + s[:kept].mean() * (u[:, :kept] @ vt[:kept]) if kept else start


def merged_matrix(matrices: Sequence[Tensor], eps: float, share: float) -> Tensor:
    """The merged task vector of matrices that are not 0, in float64, see `ace`."""
    energies = torch.stack([matrix.square().sum() for matrix in matrices])
    rows = [matrix - matrix.mean(dim=0, keepdim=True) for matrix in matrices]
    raw = [x.mT @ x for x in rows]
    traces = [covariance.trace() for covariance in raw]
    if spread(energies) <= HETEROGENEOUS or min(traces) == 0:
        return fitted(rows, raw, [torch.full_like(t, eps) for t in traces], 1.0)
    covariances = [c / trace for c, trace in zip(raw, traces, strict=True)]
    ridges = [eps / trace for trace in traces]
    start = fitted(rows, covariances, ridges, 1 / float(energies.mean()))
    mean = torch.stack(covariances).mean(dim=0)
    mean.diagonal().add_(torch.stack(ridges).mean())
    return refined(start, rows, covariances, mean, share)


@merging_method("ace", source="arXiv:2603.02945", whole=True, of_outputs=True)
def ace(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    eps: float = 0.01,
    rank_fraction: float = 0.3,
    exclude_keys: Sequence[str] | None = None,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda (\sum_t X_t \hat\Sigma_t)(\sum_t \hat\Sigma_t + C)^{-1}\).

    As the authors' code: \(X_t\) is \(\tau_t\) with centred columns, \(\Sigma_t = X_t^\top X_t\),
    \(\hat\Sigma_t = \Sigma_t + \epsilon I\), and every row of C is the mean row of \(\sum_t
    \Sigma_t\). Where the squared norms of the \(\tau_t\) are heterogeneous, see `spread`,
    \(\Sigma_t\) and \(\epsilon\) are divided by the trace of \(\Sigma_t\), C by the mean squared
    norm; and to the result \(W_0\) comes \(\bar\sigma\, U_k V_k^\top\), from the k largest singular
    values of \(W_0 + \sum_t X_t (\Sigma_t - \frac{1}{T} \sum_s \hat\Sigma_s)\). Zero vectors do not
    count. Tensors that are not spectral, see `merging.spectral`, become \(\theta_0 + \lambda\)
    times the mean of the task vectors.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda.
        eps: epsilon, in the units of squared task vectors.
        rank_fraction: k, as a share of the singular values.
        exclude_keys: further tensors to average.

    Source: Xu et al., "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation",
    arXiv:2603.02945.
    """
    if not eps > 0 or not 0 <= rank_fraction <= 1:
        raise UsageError(
            "ace's eps must be above 0 and its rank_fraction from 0 to 1, got "
            f"eps={eps}, rank_fraction={rank_fraction}"
        )
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    matrices = [matrix for matrix in spectral.matrices(piece) if matrix.any()]
    if not matrices:
        return piece.base.clone()
    merged = merged_matrix(matrices, eps, rank_fraction).mul_(scaling_factor)
    return merged.reshape(-1).to(piece.base.dtype).add_(piece.base)
