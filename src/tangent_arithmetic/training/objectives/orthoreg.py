r"""OrthoReg: the columns of each matrix of a task vector are orthonormal.

\[ L(\tau) + \lambda \sum_l \|\Delta W_l^\top \Delta W_l - I\|_F^2 \]

over the trained matrices, \(\Delta W = W - W_0\), kernels flattened to (out, rest). Of a matrix
with more columns than rows, the rows are meant: its columns cannot be orthonormal.

Source: OrthoReg, as in the repository lshangge/OrthoReg_lora; its lambda is about 10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Penalised, Setting
from tangent_arithmetic.training.objectives.supervised import supervised_of
from tangent_arithmetic.training.reparametrised import theta_of

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT = 10.0


def defect(step: Float[Tensor, "out ..."]) -> Float[Tensor, ""]:
    r"""\(\|\Delta W^\top \Delta W - I\|_F^2\), by the smaller Gram matrix."""
    matrix = step.flatten(1)
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = matrix.T @ matrix
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


class OrthoReg(Penalised):
    """A supervised loss, and lambda times the sum of `defect` over the trained matrices.

    Args:
        supervised: the loss on labelled images.
        weight: lambda.
        model: the classifier, at its initial weights.
    """

    def __init__(self, supervised: Objective, weight: float, model: nn.Module) -> None:
        super().__init__(supervised, weight)
        self.encoder: nn.Module = getattr(model, "image_encoder", model)
        start = (
            self.encoder.theta0()
            if isinstance(self.encoder, LinearizedEncoder)
            else theta_of(self.encoder)
        )
        self.start = {name: value.detach().clone() for name, value in start.items()}

    def penalty(self, model: nn.Module, step: int) -> Float[Tensor, ""] | None:
        """Lambda times the sum over the trained matrices, None without any; the same on all ranks.

        It is in full precision also under autocast.
        """
        theta = {n: v for n, v in theta_of(self.encoder).items() if v.requires_grad and matrix(v)}
        if not theta:
            return None
        device = next(iter(theta.values())).device
        with torch.autocast(device.type, enabled=False):
            steps = (value - self.start[name].to(device) for name, value in theta.items())
            return self.weight * torch.stack([defect(step) for step in steps]).sum()


def matrix(weight: Tensor) -> bool:
    """Whether a weight maps inputs to outputs: not a token, nor positions, stored as (1, n, d)."""
    return weight.ndim >= 2 and weight.shape[0] > 1 and weight[0].numel() > 1


@OBJECTIVES.register("orthoreg")
def orthoreg(setting: Setting) -> OrthoReg:
    """OrthoReg with the setting's weight (default 10).

    Raises:
        ValueError: without a model.
    """
    if setting.model is None:
        raise ValueError("expected a classifier for OrthoReg, got none")
    labelled = supervised_of(setting.recipe, setting.multilabel)
    return OrthoReg(labelled, setting.weight(WEIGHT), setting.model)
