r"""WUDI: a merged matrix that interferes least with the inputs each task vector was made by.

The rows of a task vector lie near the span of the task's inputs, so the objective measures the
change of each task's outputs without data:
\(\min_M \sum_t \|(M - \tau_t) \tau_t^\top\|_F^2 / \|\tau_t\|_F^2\). With
\(G_t = \tau_t^\top \tau_t / \|\tau_t\|_F^2\), its gradient is \(2 (M \sum_t G_t - \sum_t \tau_t
G_t)\), so that the two sums are all that either method needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.merging import spectral
from tangent_arithmetic.merging.methods.isotropic import summed
from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError


def sums(piece: Piece) -> tuple[Tensor, Tensor]:
    r"""\(\sum_t G_t\) and \(\sum_t \tau_t G_t\) of a matrix, in float64."""
    grams = products = torch.zeros(0)
    for i, tau in enumerate(spectral.matrices(piece)):
        energy = tau.square().sum().clamp(min=torch.finfo(tau.dtype).tiny)  # 0 of a zero vector
        gram = (tau.mT @ tau).div_(energy)
        product = (tau @ tau.mT @ tau).div_(energy) if spectral.is_wide(tau) else tau @ gram
        grams = grams.add_(gram) if i else gram
        products = products.add_(product) if i else product
    return grams, products


@merging_method(
    "wudi",
    source="arXiv:2503.08099",
    algorithm="WUDIMerging",
    config="wudi/wudi",
    whole=True,
    of_outputs=True,
)
def wudi(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    iter_num: int = 300,
    lr: float = 1e-5,
    exclude_keys: Sequence[str] | None = None,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda M\), with M after some steps of Adam on WUDI's objective.

    M starts at \(\sum_t \tau_t\). Tensors that are not spectral, see `merging.spectral`, become
    \(\theta_0 + \lambda\) times the mean of the task vectors, as in fusion-bench; the authors'
    code leaves them, and all but the layers of attention and MLPs, at \(\theta_0\).

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda; the paper has 1.
        iter_num: number of steps; 400 in fusion-bench's configuration.
        lr: learning rate, at most the change of a weight in a step.
        exclude_keys: further tensors to average.

    Source: Cheng et al., "Whoever Started the Interference Should End It", arXiv:2503.08099,
    algorithm 1.
    """
    if iter_num < 0 or not lr > 0:
        raise UsageError(
            f"wudi's iter_num must be at least 0 and its lr above 0, got iter_num={iter_num}, "
            f"lr={lr}"
        )
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    merged = spectral.mean_tau(piece).mul_(len(piece.thetas)).view(piece.shape)
    grams, products = (value.to(merged.dtype) for value in sums(piece))
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(iter_num):
        merged.grad = (merged @ grams).sub_(products).mul_(2)
        optimizer.step()
    return merged.view(-1).mul_(scaling_factor).add_(piece.base)


@merging_method("wudi_closed_form", source="arXiv:2503.08099", whole=True, of_outputs=True)
def wudi_closed_form(
    piece: Piece,
    *,
    scaling_factor: float = 1.0,
    ridge: float = 0.1,
    exclude_keys: Sequence[str] | None = None,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda M\), with M at the minimum of WUDI's objective and a ridge.

    \(M = S + (\sum_t \tau_t G_t - S \sum_t G_t) (\sum_t G_t + \epsilon I)^{-1}\) minimises the
    objective plus \(\epsilon \|M - S\|_F^2\), where \(S = \sum_t \tau_t\) is the start of `wudi`
    and \(\epsilon\) is relative to the mean eigenvalue of \(\sum_t G_t\). Other tensors as in
    `wudi`.

    Without a ridge, M fits every task vector exactly as long as their ranks together do not exceed
    the size of the matrix, and its norm grows without bound where they just do: the rows of
    different tasks are then nearly dependent, and ask for different outputs.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda.
        ridge: epsilon divided by the mean eigenvalue.
        exclude_keys: further tensors to average.

    Source: Cheng et al., "Whoever Started the Interference Should End It", arXiv:2503.08099,
    the objective of algorithm 1; the ridge is ours.
    """
    if not ridge > 0:
        raise UsageError(f"wudi_closed_form's ridge must be above 0, got {ridge}")
    if not spectral.is_spectral(piece, exclude_keys):
        return spectral.mean_tau(piece).mul_(scaling_factor).add_(piece.base)
    grams, products = sums(piece)
    level = grams.diagonal().mean()
    if level == 0:
        return piece.base.clone()
    start = summed(piece)
    products -= start @ grams
    grams.diagonal().add_(ridge * level)
    merged: Tensor = start.add_(torch.linalg.solve(grams, products, left=False))
    return merged.mul_(scaling_factor).reshape(-1).to(piece.base.dtype).add_(piece.base)
