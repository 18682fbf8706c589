r"""The Gauss-Newton matrix of all blocks: a factor each, and leading directions through all layers.

\[ \tau^\top G \tau = (1 - s) \Big( \sum_k \big(\sum_l \langle V_{kl}, Z_l \rangle\big)^2
   + \sum_{lij} (\Lambda_{lij} - \textstyle\sum_k V_{klij}^2)_+ Z_{lij}^2 \Big)
   + s \sum_{lij} \Lambda_{lij} Z_{lij}^2 + \dots \]

with \(Z_l = P_l^\top D_l R_l\) the coordinates of \(\tau\) in layer l, and what bases leave out.
Fine-tuning moves the features by all layers in concert, so that terms between layers are most of
\(\|J \tau\|^2\). The directions are those of few images and not of others: the share s, a
shrinkage, is left to independent layers, which hold for images that were not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.training.factors.blocks import Block
from tangent_arithmetic.training.factors.factor import Factor

if TYPE_CHECKING:
    from jaxtyping import Float

SHRINKAGE = 0.5
CORNER = 64  # coordinates of rows and columns that directions have


@dataclass(frozen=True)
class Factors:
    """An approximation of G, the mean of J^T J / |f0|^2 over images.

    Attributes:
        blocks: the blocks of parameters.
        factors: the factor of each block, by the block's name.
        directions: V, the leading directions in the first coordinates of each block, by its name;
            blocks without are independent of all others.
        shrinkage: s.
        info: provenance, JSON-serialisable.
    """

    blocks: tuple[Block, ...]
    factors: Mapping[str, Factor]
    directions: Mapping[str, Float[Tensor, "k p q"]] = field(default_factory=dict)
    shrinkage: float = SHRINKAGE
    info: Mapping[str, Any] = field(default_factory=dict)

    def residual(self, name: str) -> Float[Tensor, "p q"]:
        """The moments of a block that its directions leave."""
        moments = self.factors[name].moments
        if name not in self.directions:
            return moments
        left = moments.clone()
        v = self.directions[name]
        left[: v.shape[1], : v.shape[2]] -= v.square().sum(0)
        return left.clamp_(min=0)

    def own_moments(self, name: str) -> Float[Tensor, "p q"]:
        """The weights of a block's squared coordinates."""
        return torch.lerp(self.residual(name), self.factors[name].moments, self.shrinkage)

    def values(self, tau: Mapping[str, Tensor]) -> dict[str, float]:
        """The estimate of mean |J_l tau_l|^2 / |f0|^2 for each block alone, by its name."""
        return {
            block.name: float(self.factors[block.name].value(self._of(block, tau)))
            for block in self.blocks
        }

    def value(self, tau: Mapping[str, Tensor]) -> float:
        """The estimate of mean |J tau|^2 / |f0|^2."""
        return sum(float((tau[name] * v).sum()) for name, v in self.product(tau).items())

    def product(self, tau: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G tau, by name of parameter."""
        found, coordinates = dict[str, Tensor](), dict[str, Tensor]()
        for block in self.blocks:
            coordinates[block.name] = self.factors[block.name].project(self._of(block, tau))
        along = self.along(coordinates)
        for block in self.blocks:
            factor, z = self.factors[block.name], coordinates[block.name]
            inner = (self.own_moments(block.name) - factor.rest) * z
            if along is not None and block.name in self.directions:
                v = self.directions[block.name]
                part = torch.einsum("k,kpq->pq", along, v) * (1 - self.shrinkage)
                inner[: v.shape[1], : v.shape[2]] += part
            matrix = factor.expand(inner) + factor.rest * self._of(block, tau)
            found |= block.parts(matrix)
        return found

    def along(self, coordinates: Mapping[str, Tensor]) -> Float[Tensor, " k"] | None:
        """The coordinates along the leading directions; None if there are none."""
        parts = [
            torch.einsum("kpq,pq->k", v, coordinates[name][: v.shape[1], : v.shape[2]])
            for name, v in self.directions.items()
            if name in coordinates
        ]
        return sum(parts[1:], parts[0]) if parts else None

    def _of(self, block: Block, tau: Mapping[str, Tensor]) -> Tensor:
        return block.matrix(tau).to(self.factors[block.name].moments)

    def to(self, target: torch.device | torch.dtype) -> Factors:
        """The factors on another device, or in another precision."""
        factors = {name: factor.to(target) for name, factor in self.factors.items()}
        directions = {name: value.to(target) for name, value in self.directions.items()}
        return replace(self, factors=factors, directions=directions)

    def numel(self) -> int:
        """Numbers that it holds."""
        tensors: Iterable[Tensor] = (
            t for factor in self.factors.values() for t in factor.tensors().values()
        )
        return sum(t.numel() for t in (*tensors, *self.directions.values()))
