r"""The estimate \(\tau^\top G \tau\) beside the exact mean of \(\|J \tau\|^2 / \|f_0\|^2\)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_arithmetic.encoders.base import LinearEncoder
from tangent_arithmetic.training.factors.blocks import Block
from tangent_arithmetic.training.factors.whole import Factors

WHOLE = "whole"


@dataclass(frozen=True)
class Comparison:
    """What factors say of a task vector, and what is true.

    Attributes:
        estimates: the estimate for each block alone, by name, and for the `WHOLE`.
        exact: the true values.
    """

    estimates: Mapping[str, float]
    exact: Mapping[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Estimate / exact, by name; without blocks that leave all features alone."""
        return {name: self.estimates[name] / v for name, v in self.exact.items() if v > 0}


def compare(
    encoder: LinearEncoder, factors: Factors, tau: Mapping[str, Tensor], batches: Iterable[Tensor]
) -> Comparison:
    """The comparison on images, best of the factors' data set but not among those collected from.

    Args:
        encoder: the linearised encoder.
        factors: the factors.
        tau: the task vector.
        batches: images.
    """
    estimates = {**factors.values(tau), WHOLE: factors.value(tau)}
    return Comparison(estimates, exact_values(encoder, factors.blocks, tau, batches))


def exact_values(
    encoder: LinearEncoder,
    blocks: Sequence[Block],
    tau: Mapping[str, Tensor],
    batches: Iterable[Tensor],
) -> dict[str, float]:
    """The mean of |J_l tau_l|^2 / |f0|^2 over images, by name of block, and for the `WHOLE`."""
    parts = [{name: tau[name] for name in block.names} for block in blocks]
    totals, count = torch.zeros(len(parts) + 1, dtype=torch.float64), 0
    for images in batches:
        with torch.no_grad():
            f0, tangents = encoder.tangents(images, [*parts, tau])
        scale = f0.double().square().sum(1)
        scale = scale.where(scale > 0, torch.inf)  # an image without features counts as 0
        for i, tangent in enumerate(tangents):
            totals[i] += float((tangent.double().square().sum(1) / scale).sum())
        count += len(images)
    names = [*(block.name for block in blocks), WHOLE]
    return dict(zip(names, (totals / max(count, 1)).tolist(), strict=True))
