"""What an encoder is, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self, TypeIs

Transform = Callable[[Any], Any]


class Encoder(Protocol):
    """A module that gives features of a batch, and hands out the weights that are edited.

    Whatever is evaluated, edited or fine-tuned by the rest of the package is one of these; its
    inputs may be images, texts or anything else that a batch can hold.

    Attributes:
        train_preprocess: transform of one input for training; None for none.
        val_preprocess: transform of one input for evaluation; None for none.
    """

    train_preprocess: Transform | None
    val_preprocess: Transform | None

    def __call__(self, batch: Tensor, /) -> Tensor:
        """Features, shape (batch, features)."""

    def eval(self) -> Self:
        """Switches to evaluation, as `nn.Module.eval`."""

    def to(self, device: torch.device, /) -> Self:
        """Moves the weights, as `nn.Module.to`."""

    def weights(self) -> dict[str, Tensor]:
        """theta: parameters and persistent buffers by name, not copied."""

    def load_weights(self, theta: Mapping[str, Tensor], /) -> None:
        """Copies theta into the encoder."""

    def identity(self) -> str:
        """What tells it from encoders of another architecture, such as the model's name."""


class LinearEncoder(Encoder, Protocol):
    """The linearisation of an encoder at theta0."""

    def standard(self) -> Encoder:
        """The encoder at theta, not linearised: a copy."""

    def theta0(self) -> dict[str, Tensor]:
        """The point of expansion: parameters by name, not copied."""

    def weights0(self) -> dict[str, Tensor]:
        """theta0 and the persistent buffers, under the names of `weights`."""

    def displacement(self) -> dict[str, Tensor]:
        """`theta - theta0` by name, in at least float32."""

    def tangents(
        self, batch: Tensor, vectors: Sequence[Mapping[str, Tensor]], /
    ) -> tuple[Tensor, list[Tensor]]:
        """f(x; theta0) and J(x; theta0) tau for each vector, each of shape (batch, features)."""


def is_linear(encoder: Encoder) -> TypeIs[LinearEncoder]:
    """Whether an encoder is a linearisation."""
    return hasattr(encoder, "displacement")
