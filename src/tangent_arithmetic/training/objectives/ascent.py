"""Gradient ascent on a task: the baseline of negation that unlearns by the loss itself.

Source: arXiv:2212.04089, section 3, where it costs the control set nearly all its accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective, Setting
from tangent_arithmetic.training.objectives.supervised import supervised_of

if TYPE_CHECKING:
    from jaxtyping import Float


class Ascent(Objective):
    """The negative of a supervised loss, which has no minimum.

    Args:
        supervised: the loss on labelled images.
    """

    def __init__(self, supervised: Objective) -> None:
        self.supervised = supervised

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"] | Float[Tensor, ""]:
        """The negative loss."""
        return -self.supervised.loss(model, batch, step)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The state of the supervised objective."""
        return self.supervised.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Restores the state of the supervised objective."""
        return self.supervised.load_state_dict(state)


@OBJECTIVES.register("ascent")
def ascent(setting: Setting) -> Ascent:
    """Gradient ascent."""
    return Ascent(supervised_of(setting.recipe, setting.multilabel))
