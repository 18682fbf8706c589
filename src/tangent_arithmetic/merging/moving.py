r"""An encoder that moves along task vectors, which are read tensor by tensor.

\(\theta(\alpha) = \theta_0 + \sum_k \alpha_{g,k} \tau_k\), with a coefficient for each task k and
group g of weights; one backward pass gives the derivatives in all of them,
\(\partial L / \partial \alpha_{g,k} = \langle \nabla_g L, \tau_{k,g} \rangle\).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.groups import grouped
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.merging.examples import Examples
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.storage.statedict import is_real_float, ties
from tangent_arithmetic.tangent.caches import empty_caches

if TYPE_CHECKING:
    from jaxtyping import Float64

ALL = "all weights"  # the group of a coefficient for each task


class MovingEncoder:
    """An encoder at theta0 + sum of alpha tau, with task vectors that are read on demand.

    Buffers, such as running means, move along without derivatives.

    Args:
        examples: the models.
        grouping: "task", or a grouping of `arithmetic.solving.groups`.

    Attributes:
        encoder: the encoder, moved in place.
        groups: the groups of weights; alpha has a row for each and a column for each model.
    """

    def __init__(self, examples: Examples, grouping: str) -> None:
        self.encoder: ModuleEncoder = examples.encoder()
        self.theta0 = examples.weights(PRETRAINED)
        self.thetas = [examples.weights(model) for model in examples.models]
        state = self.encoder.weights()
        tied = ties(state)
        self.state = {n: v for n, v in state.items() if is_real_float(v) and n not in tied}
        of = (lambda _: ALL) if grouping == "task" else grouped(grouping, list(state))
        self.group_of = {name: of(name) for name in self.state}
        self.groups = list(dict.fromkeys(self.group_of.values()))
        self.row = {group: i for i, group in enumerate(self.groups)}

    def _tau(self, name: str, theta: Mapping[str, Tensor], start: Tensor) -> Tensor:
        return theta[name].to(start) - start

    @torch.no_grad()
    def place(self, alpha: Float64[Tensor, "groups models"]) -> None:
        """Moves the encoder."""
        for name, value in self.state.items():
            start = self.theta0[name].to(value)
            value.copy_(start)
            row = alpha[self.row[self.group_of[name]]].tolist()
            for coef, theta in zip(row, self.thetas, strict=True):
                value.add_(self._tau(name, theta, start), alpha=coef)
        empty_caches(self.encoder)

    @torch.no_grad()
    def gradient(self) -> Float64[Tensor, "groups models"]:
        """The derivatives in alpha, from the parameters' gradients, which are freed."""
        total = torch.zeros(len(self.groups), len(self.thetas), dtype=torch.float64)
        for name, p in self.encoder.named_parameters():
            if p.grad is None:
                continue
            start, row = self.theta0[name].to(p.detach()), self.row[self.group_of[name]]
            for k, theta in enumerate(self.thetas):
                tau = self._tau(name, theta, start)
                total[row, k] += float(torch.dot(p.grad.flatten(), tau.flatten()))
            p.grad = None
        return total


def merged_encoder(examples: Examples, scaling_factor: float) -> ModuleEncoder:
    """A new encoder at theta0 + scaling_factor * sum of tau."""
    moving = MovingEncoder(examples, "task")
    moving.place(torch.full((1, len(moving.thetas)), scaling_factor, dtype=torch.float64))
    return moving.encoder
