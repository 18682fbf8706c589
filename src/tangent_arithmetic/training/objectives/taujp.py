r"""τJp: the tangent of a task vector vanishes on the images of other tasks.

\[ L(\tau) + \lambda\, \mathbb{E}_{x \in D_{other}} \|J(x; \theta_0)\, \tau\|^2 \]

What remains of a task vector on other tasks' images is what a sum of task vectors suffers from.
The images need no labels.

Source: Yoshida et al., "Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement", ICLR 2025. Its "efficient" form takes images of one other task a step, in turn;
the strict one of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Penalised, Setting
from tangent_arithmetic.training.objectives.supervised import supervised_of

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHT = 7.0  # chosen on validation, see docs/methods.md
Norm = Literal["relative", "squared", "plain"]


def tangent_size(
    f0: Float[Tensor, "batch features"], tangent: Float[Tensor, "batch features"], norm: Norm
) -> Float[Tensor, " batch"]:
    r"""The size of \(d = J \tau\) for each image, in at least float32.

    Args:
        f0: features at theta0.
        tangent: d.
        norm: "relative", \(\|d\|^2 / \|f_0\|^2\), 0 where \(f_0 = 0\); "squared",
            \(\|d\|^2\); "plain", \(\|d\|\).
    """
    wide = torch.promote_types(tangent.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(tangent.to(wide), dim=1)
    if norm == "plain":
        return lengths
    squares = tangent.to(wide).square().sum(dim=1)
    if norm == "squared":
        return squares
    scale = f0.detach().to(wide).square().sum(dim=1)
    return squares / scale.where(scale > 0, torch.inf)


class TauJp(Penalised):
    """A supervised loss, and lambda times the mean size of J tau on other images.

    Args:
        supervised: the loss on labelled images.
        weight: lambda.
        others: the other images.
        norm: see `tangent_size`.
    """

    def __init__(
        self, supervised: Objective, weight: float, others: Unlabelled, norm: Norm = "relative"
    ) -> None:
        super().__init__(supervised, weight)
        self.others, self.norm = others, norm

    def penalty(self, model: nn.Module, step: int) -> Float[Tensor, ""]:
        """Lambda times the mean over the step's other images, of which a rank has a share."""
        encoder = linear_encoder(model)
        images = self.others.batch(step).to(next(model.parameters()).device, non_blocking=True)
        f0, tangent = encoder.model.primal_and_tangent(images)
        mean = tangent_size(f0, tangent, self.norm).mean()
        return self.weight * self.others.weight(step) * mean

    def close(self) -> None:
        """Stops the loading of the other images."""
        self.others.close()


def linear_encoder(model: nn.Module) -> LinearizedEncoder:
    """The linearised encoder of a classifier.

    Raises:
        TypeError: if it has none.
    """
    encoder = getattr(model, "image_encoder", None)
    if not isinstance(encoder, LinearizedEncoder):
        raise TypeError(
            f"expected a classifier with a LinearizedEncoder, got a {type(encoder).__name__}; "
            "choose --finetuning-mode=linear"
        )
    return encoder


@OBJECTIVES.register("taujp")
def taujp(setting: Setting) -> TauJp:
    """τJp with the setting's weight (default 7), norm and other images."""
    norm = setting.options.get("penalty_norm", "relative")
    labelled = supervised_of(setting.recipe, setting.multilabel)
    return TauJp(labelled, setting.weight(WEIGHT), setting.unlabelled(), norm)
