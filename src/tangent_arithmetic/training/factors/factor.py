r"""One block's part of a Gauss-Newton matrix, in truncated bases of its rows and columns.

\[ \langle D, G D \rangle \approx \sum_{ij} \Lambda_{ij} (P^\top D R)_{ij}^2
   + \rho\, (\|D\|^2 - \|P^\top D R\|^2) \]

P and R are orthonormal: leading eigenvectors of \(B = E[G_n G_n^\top]\) and \(A = E[G_n^\top G_n]\)
for gradients \(G_n\) of examples, which hold all terms between tokens. In K-FAC,
\(\Lambda_{ij} = \beta_i \alpha_j / \mathrm{tr} A\); in EK-FAC
\(\Lambda_{ij} = E (p_i^\top G_n r_j)^2\), exact on the diagonal. What the bases
leave out has the mean eigenvalue \(\rho\).

Source: Martens and Grosse, arXiv:1503.05671; George et al. (EK-FAC), arXiv:1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Factor:
    """The part of one block.

    Attributes:
        moments: Lambda; of the block's own entries if there are no bases.
        rest: rho.
        left: P, or None for a diagonal.
        right: R, or None for a diagonal.
    """

    moments: Float[Tensor, "p q"]
    rest: Float[Tensor, ""]
    left: Float[Tensor, "rows p"] | None = None
    right: Float[Tensor, "columns q"] | None = None

    def project(self, block: Float[Tensor, "rows columns"]) -> Float[Tensor, "p q"]:
        """The coordinates of a block, P^T D R."""
        if self.left is None or self.right is None:
            return block
        return self.left.mT @ (block @ self.right)

    def expand(self, coordinates: Float[Tensor, "p q"]) -> Float[Tensor, "rows columns"]:
        """The block with these coordinates, P Z R^T."""
        if self.left is None or self.right is None:
            return coordinates
        return (self.left @ coordinates) @ self.right.mT

    def product(self, block: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """G D."""
        z = self.project(block)
        return self.expand((self.moments - self.rest) * z) + self.rest * block

    def value(self, block: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
        """D^T G D."""
        return (block * self.product(block)).sum()

    def trace(self, shape: tuple[int, int]) -> Float[Tensor, ""]:
        """The trace of G, of a block of this shape."""
        return self.moments.sum() + self.rest * (shape[0] * shape[1] - self.moments.numel())

    def to(self, target: torch.device | torch.dtype) -> Factor:
        """The factor on another device, or in another precision."""
        tensors = {name: value.to(target) for name, value in self.tensors().items()}
        return replace(self, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of its attributes."""
        names = ("moments", "rest", "left", "right")
        return {name: value for name in names if (value := getattr(self, name)) is not None}
