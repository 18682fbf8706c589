r"""TAK: τJp without images, by factors of the Gauss-Newton matrix at theta0.

\[ L(\tau) + \beta\, \tau^\top G \tau, \quad G \approx E_x J^\top J / \|f_0\|^2 \]

over the images of other data sets, of which factors are all that is needed
(`training/factors/`). Its weight has the scale of τJp's relative penalty; it is larger by
default, since an optimizer finds what an estimate misses.

Source: TAK, arXiv:2602.17385, with K-FAC independent in the layers; ours hold the terms between
tokens and leading directions through all layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import check_part
from tangent_arithmetic.training.factors.blocks import Block
from tangent_arithmetic.training.factors.factor import Factor
from tangent_arithmetic.training.factors.whole import Factors
from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Penalised, Setting
from tangent_arithmetic.training.objectives.supervised import supervised_of
from tangent_arithmetic.training.objectives.taujp import linear_encoder

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT = 100.0
FILES = "factors"  # the name under which a setting has them


class Projection(torch.autograd.Function):
    r"""The coordinates \(P^\top D R\) of a block D of theta - theta0, and \(\|D\|^2\).

    D is computed anew in the backward pass: a step keeps nothing of the weights' size.
    """

    @staticmethod
    def forward(
        ctx: Any, block: Block, factor: Factor, theta0: tuple[Tensor, ...], *theta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Coordinates (p, q), and the square of the norm."""
        ctx.block, ctx.factor, ctx.theta0 = block, factor, theta0
        ctx.save_for_backward(*theta)
        displacement = _displacement(block, theta, theta0, factor)
        square = torch.linalg.vector_norm(displacement).square()
        return factor.project(displacement), square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_z: Tensor, d_square: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of theta."""
        block, factor, theta = ctx.block, ctx.factor, ctx.saved_tensors
        displacement = _displacement(block, theta, ctx.theta0, factor)
        gradient = factor.expand(d_z) + displacement.mul_(2 * d_square)
        parts = block.parts(gradient)
        return (
            *(None, None, None),
            *(
                parts[name].to(value) if needed else None
                for name, value, needed in zip(
                    block.names, theta, ctx.needs_input_grad[3:], strict=True
                )
            ),
        )


def _displacement(
    block: Block, theta: tuple[Tensor, ...], theta0: tuple[Tensor, ...], factor: Factor
) -> Float[Tensor, "rows columns"]:
    with torch.no_grad():
        differences = [
            (a.to(factor.moments) - b.to(factor.moments))
            for a, b in zip(theta, theta0, strict=True)
        ]
        return block.matrix(dict(zip(block.names, differences, strict=True)))


class Tak(Penalised):
    r"""A supervised loss, and \(\beta\, \tau^\top G \tau\) once a step.

    Args:
        supervised: the loss on labelled images.
        weight: beta.
        factors: of G; moved to the model's device when they are first needed.
    """

    def __init__(self, supervised: Objective, weight: float, factors: Factors) -> None:
        super().__init__(supervised, weight)
        self.factors = factors
        self._own = dict[str, Tensor]()  # moments without the part of the directions, less rest

    def penalty(self, model: nn.Module, step: int) -> Float[Tensor, ""] | None:
        """Beta times the penalty; the same on all ranks."""
        linear = linear_encoder(model).model
        device = next(model.parameters()).device
        if not self._own:
            self._prepare(device, linear.theta0())
        with torch.autocast(device.type, enabled=False):
            value = self._value(linear.theta(), linear.theta0())
        return None if value is None else self.weight * value

    def _prepare(self, device: torch.device, theta0: dict[str, Tensor]) -> None:
        """Moves the factors to the device, and checks that they are of the model's parameters."""
        blocks = self.factors.blocks
        shapes = {n: s for b in blocks for n, s in zip(b.names, b.shapes, strict=True)}
        theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        check_part(theta0, theirs, "factors of other parameters: the model's and theirs")
        self.factors = self.factors.to(device)
        self._own = {
            block.name: self.factors.own_moments(block.name) - self.factors.factors[block.name].rest
            for block in blocks
        }

    def _value(self, theta: dict[str, Tensor], theta0: dict[str, Tensor]) -> Tensor | None:
        """The penalty of all blocks that have trained parameters."""
        total, coordinates = list[Tensor](), dict[str, Tensor]()
        for block in self.factors.blocks:
            ours = [theta[name] for name in block.names]
            if not any(value.requires_grad for value in ours):
                continue
            factor = self.factors.factors[block.name]
            start = tuple(theta0[name] for name in block.names)
            z, square = Projection.apply(block, factor, start, *ours)
            coordinates[block.name] = z
            total.append((self._own[block.name] * z.square()).sum() + factor.rest * square)
        if not total:
            return None
        along = self.factors.along(coordinates)
        value = torch.stack(total).sum()
        share = 1 - self.factors.shrinkage
        return value if along is None else value + share * along.square().sum()


@OBJECTIVES.register("tak")
def tak(setting: Setting) -> Tak:
    """TAK with the setting's weight (default 100) and the factors in its files.

    Raises:
        ValueError: if there are none.
        UsageError: for another norm of the penalty than the relative one.
    """
    norm = setting.options.get("penalty_norm", "relative")
    if norm != "relative":
        raise UsageError(
            f"--penalty-norm={norm}: TAK's penalty is relative to |f0|^2; leave the flag out"
        )
    if setting.files is None:
        raise ValueError("expected factors of other data sets for this objective, got none")
    labelled = supervised_of(setting.recipe, setting.multilabel)
    return Tak(labelled, setting.weight(WEIGHT), setting.files(FILES))
