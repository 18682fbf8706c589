r"""Eigenfunctions of a kernel on images, where they live, and which of them a function uses.

\(K = \sum_\rho \lambda_\rho v_\rho v_\rho^\top\) over the images of several tasks. A kernel whose
eigenfunctions are each large on the images of one task alone can edit the tasks independently.

Eigenfunctions are not continuous in the kernel: an error as large as the gap between two
eigenvalues mixes theirs. So `energy` and `use` of single ones need an exact kernel.

Source: arXiv:2305.12827, section 6; CKA: arXiv:1905.00414.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Float64


@dataclass(frozen=True)
class Eigenfunctions:
    """The eigenfunctions of a kernel on its images, those of large eigenvalues first.

    Attributes:
        eigenvalues: each at least zero.
        vectors: values on the images; orthonormal columns.
    """

    eigenvalues: Float64[Tensor, " functions"]
    vectors: Float64[Tensor, "images functions"]

    @classmethod
    def of(cls, kernel: Float[Tensor, "images images"]) -> Eigenfunctions:
        """Those of a symmetric kernel matrix."""
        values, vectors = torch.linalg.eigh(kernel.double())
        return cls(values.flip(0).clamp_min(0), vectors.flip(1))

    def energy(self, groups: Sequence[int]) -> Float64[Tensor, "functions groups"]:
        """The share of each eigenfunction's square on each group of images that follow each other.

        Args:
            groups: number of images of each group.
        """
        squares = self.vectors.square().split(list(groups))
        return torch.stack([part.sum(dim=0) for part in squares], dim=1)

    def use(self, function: Float[Tensor, "images features"]) -> Float64[Tensor, " functions"]:
        r"""The share of \(\|F\|^2\) that a function of the images has along each eigenfunction."""
        along = (self.vectors.T @ function.double()).square().sum(dim=1)
        return along / along.sum()


def cka(one: Float[Tensor, "images a"], other: Float[Tensor, "images b"]) -> float:
    r"""Linear centred kernel alignment of the features of the same images, in [0, 1].

    \[ \frac{\|X^\top Y\|_F^2}{\|X^\top X\|_F\, \|Y^\top Y\|_F} \]
    """
    x, y = (value.double() - value.double().mean(dim=0) for value in (one, other))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
