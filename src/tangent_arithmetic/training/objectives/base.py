"""The interface of a training objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.registry import Registry


class Objective(Protocol):
    """A loss to minimise; subclasses without a state define `loss` alone."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        """The loss of a batch.

        Args:
            model: gives logits, shape (batch, classes).
            batch: images and labels, on the model's device.
            step: the optimizer step, from 0.

        Returns:
            One loss an image, shape (batch,), or their mean, a scalar.
        """
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """What an exact resume needs of the objective."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Restores what `state_dict` gave."""
        return None


OBJECTIVES: Registry[Callable[[Recipe], Objective]] = Registry("objective")
