"""Training objectives: the interface, and what one is built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tangent_arithmetic.runtime.registry import Registry
from tangent_arithmetic.training.recipe import Recipe

if TYPE_CHECKING:
    from jaxtyping import Float

    from tangent_arithmetic.data.unlabelled import Unlabelled


class Objective(Protocol):
    """A loss to minimise; subclasses define `loss`, and what else they have."""

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"] | Float[Tensor, ""]:
        """The loss of each image of a batch, or their mean.

        Args:
            model: maps images to logits, shape (batch, classes).
            batch: images and labels, on the model's device; labels are int64 (batch,), or zeros and
                ones (batch, classes) in uint8 where an image has several.
            step: the optimizer step, from 0.
        """
        ...

    def penalty(self, model: nn.Module, step: int) -> Float[Tensor, ""] | None:
        """What is added to the mean loss of a step, once a step whatever the batches; or None.

        Args:
            model: the model, never wrapped in DDP. Ranks may return different values, of which the
                mean counts.
            step: the optimizer step; those of a run are asked for in order.
        """
        return None

    def close(self) -> None:
        """Ends what the objective has started, such as data-loading processes."""
        return

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors that an exact resume needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Restores the tensors of `state_dict`."""
        return None


@dataclass(frozen=True)
class Setting:
    """What an objective is built from.

    Attributes:
        recipe: the training recipe.
        multilabel: whether an image has several labels.
        model: the classifier, with an image encoder and a frozen head, on its device.
        penalty: weight of the penalty; None for the objective's own default.
        options: further settings, by the name of their flag.
        others: images without labels that the edit is to leave alone; raises an error if there are
            none.
        files: files that the objective needs, by name; raises an error that says how to make them.
    """

    recipe: Recipe
    multilabel: bool = False
    model: nn.Module | None = None
    penalty: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    others: Callable[[], Unlabelled] | None = None
    files: Callable[[str], Any] | None = None

    def weight(self, default: float) -> float:
        """The penalty's weight."""
        return default if self.penalty is None else self.penalty

    def unlabelled(self) -> Unlabelled:
        """The images of `others`.

        Raises:
            ValueError: if there are none.
        """
        if self.others is None:
            raise ValueError("expected images of other data sets for this objective, got none")
        return self.others()


OBJECTIVES: Registry[Callable[[Setting], Objective]] = Registry("objective")


class Penalised(Objective):
    """A supervised objective with a penalty; subclasses define `penalty`.

    Args:
        supervised: the loss on labelled images.
        weight: of the penalty.
    """

    def __init__(self, supervised: Objective, weight: float) -> None:
        self.supervised, self.weight = supervised, weight

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"] | Float[Tensor, ""]:
        """The supervised loss."""
        return self.supervised.loss(model, batch, step)

    def state_dict(self) -> Mapping[str, Tensor]:
        """The state of the supervised objective."""
        return self.supervised.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Restores the state of the supervised objective."""
        return self.supervised.load_state_dict(state)
