"""The encoder protocol, and a base class for modules that implement it.

Everything that is evaluated, edited or fine-tuned is an `Encoder`. To add one, subclass
`ModuleEncoder`, and register how to load its checkpoints, see `encoders.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self, TypeIs

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import TIES, copy_into, places, ties
from tangent_arithmetic.tangent.caches import empty_caches

if TYPE_CHECKING:
    from jaxtyping import Float

Transform = Callable[[Any], Any]
BUILT = "built"  # in a checkpoint's metadata, see `ModuleEncoder.built`


class Encoder(Protocol):
    """A map from inputs (images, token ids, ...) to features, with readable, replaceable weights.

    Attributes:
        train_preprocess: transform of one input for training; None for the identity.
        val_preprocess: transform of one input for evaluation; None for the identity.
    """

    train_preprocess: Transform | None
    val_preprocess: Transform | None

    def __call__(self, inputs: Tensor, /) -> Float[Tensor, "batch features"]:
        """Features of a batch."""

    def eval(self) -> Self:
        """Switches to evaluation mode, as `nn.Module.eval`."""

    def to(self, device: torch.device, /) -> Self:
        """Moves the weights, as `nn.Module.to`."""

    def weights(self) -> dict[str, Tensor]:
        """theta: parameters and persistent buffers by name, not copied."""

    def load_weights(self, theta: Mapping[str, Tensor], /) -> None:
        """Copies theta into the encoder."""

    def identity(self) -> str:
        """The name of the architecture, for messages and caches."""


class LinearEncoder(Encoder, Protocol):
    """The linearisation of an encoder at theta0."""

    def standard(self) -> Encoder:
        """A copy of the encoder at theta, not linearised."""

    def theta0(self) -> dict[str, Tensor]:
        """The point of expansion: parameters by name, not copied."""

    def weights0(self) -> dict[str, Tensor]:
        """theta0 and the persistent buffers, under the names of `weights`."""

    def displacement(self) -> dict[str, Tensor]:
        """`theta - theta0` by name, in at least float32."""

    def tangents(
        self, inputs: Tensor, vectors: Sequence[Mapping[str, Tensor]], /
    ) -> tuple[Float[Tensor, "batch features"], list[Float[Tensor, "batch features"]]]:
        """f(x; theta0), and J(x; theta0) tau for each tau in `vectors`."""


def is_encoder(model: object) -> TypeIs[Encoder]:
    """Whether an object has an encoder's methods; a plain module does not."""
    methods = ("weights", "load_weights", "identity")
    return all(callable(getattr(model, name, None)) for name in methods)


def is_linear(model: object) -> TypeIs[LinearEncoder]:
    """Whether an object is a linearised encoder."""
    return callable(getattr(model, "displacement", None))


class ModuleEncoder(nn.Module):
    """A module as an `Encoder`: its weights are its whole state dict.

    Subclasses define `forward` and the class attribute `kind`.

    Attributes:
        kind: kind of its checkpoints, such as "text_encoder".
    """

    kind: ClassVar[str]
    train_preprocess: Transform | None
    val_preprocess: Transform | None

    def __init__(self) -> None:
        super().__init__()
        self.train_preprocess = self.val_preprocess = None

    def weights(self) -> dict[str, Tensor]:
        """theta: parameters and persistent buffers by name, not copied."""
        state: dict[str, Tensor] = self.state_dict()
        return state

    def load_weights(self, theta: Mapping[str, Tensor]) -> None:
        """Copies theta into the encoder.

        Raises:
            UsageError: if names or shapes differ; lists all differences. If weights are computed
                from others, as those of LoRA.
        """
        own = places(self.weights, self.identity())
        copy_into(own, theta, f"weights of {self.identity()} and the checkpoint")
        empty_caches(self)

    def identity(self) -> str:
        """The name of the architecture: the class's name."""
        return type(self).__name__

    def built(self) -> dict[str, Any]:
        """What determines features beside weights, JSON-serialisable, see `encoders.built`."""
        return {}

    def save(self, filename: str | Path, **info: Any) -> str:
        """Writes theta to a checkpoint.

        Args:
            filename: file to write; `.pt` becomes `.safetensors`.
            **info: metadata, JSON-serialisable; `theta0_hash` is the content hash of the weights
                that theta was fine-tuned from.

        Returns:
            The content hash of theta.
        """
        return self._save(filename, self.kind, info)

    def _save(
        self,
        filename: str | Path,
        kind: str,
        info: dict[str, Any],
        theta0: dict[str, Tensor] | None = None,
    ) -> str:
        theta, theta0_hash = self.weights(), info.pop("theta0_hash", None)
        info = {"model": self.identity(), **info}
        if facts := self.built():
            info[BUILT] = facts
        if tied := ties(theta):
            info[TIES] = tied
        return save_tensors(filename, theta, kind, theta0, theta0_hash, info)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    theta: Mapping[str, Tensor],
    name: str,
    source: str | Path,
    hint: str = "",
) -> None:
    """Raises a UsageError if weights differ from a model's in names or shapes; lists them.

    Args:
        expected: the shapes of the model's weights.
        theta: the weights.
        name: the model, for the message.
        source: the file of the weights, for the message.
        hint: a further sentence of the message.
    """
    actual = {key: tuple(value.shape) for key, value in theta.items()}
    wrong = [
        f"{shown(key)}: {actual.get(key, 'missing')}, expected {expected.get(key, 'none')}"
        for key in [*expected, *(key for key in actual if key not in expected)]
        if actual.get(key) != expected.get(key)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        more += f". {hint}" if hint else ""
        raise UsageError(f"{source} does not fit {shown(name)}: {'; '.join(wrong[:5])}{more}")
