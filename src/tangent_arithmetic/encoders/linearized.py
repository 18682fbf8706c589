"""Linearised encoders."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from tangent_arithmetic.encoders.base import Encoder, LinearEncoder, ModuleEncoder, is_linear
from tangent_arithmetic.encoders.images import ImageEncoder, ModelSettings, VisionTower
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import ENCODERS
from tangent_arithmetic.tangent.linearized import LinearizedModel

if TYPE_CHECKING:
    from jaxtyping import Float


class LinearizedEncoder(ModuleEncoder):
    """The linearisation of any `ModuleEncoder`, itself an encoder.

    Args:
        encoder: the encoder; its weights are the initial theta.
        init_encoder: the encoder whose weights are theta0; `encoder` itself if None.
    """

    def __init__(self, encoder: ModuleEncoder, init_encoder: ModuleEncoder | None = None) -> None:
        super().__init__()
        self._identity = encoder.identity()
        self._kind = f"linearized_{encoder.kind}"
        self._built = encoder.built()
        self.train_preprocess = encoder.train_preprocess
        self.val_preprocess = encoder.val_preprocess
        self.model = LinearizedModel(encoder, init_encoder)

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch features"]:
        """Linearised features of a batch."""
        features: Tensor = self.model(inputs)
        return features

    def weights(self) -> dict[str, Tensor]:
        """Theta and the persistent buffers, under the names of the standard encoder."""
        return self.model.weights()

    def weights0(self) -> dict[str, Tensor]:
        """The point of expansion and the persistent buffers, under the same names."""
        return self.model.weights0()

    def theta0(self) -> dict[str, Tensor]:
        """The point of expansion: parameters by name, not copied."""
        return self.model.theta0()

    def identity(self) -> str:
        """The name of the standard encoder's architecture."""
        return self._identity

    @property
    def saved_kind(self) -> str:
        """The kind of its checkpoints."""
        return self._kind

    def built(self) -> dict[str, Any]:
        """Those of the standard encoder."""
        return self._built

    def standard(self) -> ModuleEncoder:
        """A copy of the encoder at theta, not linearised."""
        encoder = self.model.standard()
        assert isinstance(encoder, ModuleEncoder)
        encoder.load_weights(self.weights())
        return encoder

    def tangents(
        self, inputs: Tensor, vectors: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Float[Tensor, "batch features"], list[Float[Tensor, "batch features"]]]:
        """f(x; theta0) and J(x; theta0) tau for each vector, see `LinearizedModel.tangents`."""
        return self.model.tangents(inputs, vectors)

    def displacement(self) -> dict[str, Tensor]:
        """`theta - theta0` by name of parameter, in at least float32; of complex ones too."""
        theta, theta0 = self.model.theta(), self.model.theta0()
        with torch.no_grad():
            steps = {name: v - theta0[name] for name, v in theta.items() if v.is_complex()}
            real = {name: value for name, value in theta.items() if name not in steps}
            return statedict.difference(real, {name: theta0[name] for name in real}) | steps

    def save(self, filename: str | Path, **info: Any) -> str:
        """Writes theta, and theta0 unless a zero-shot file near `filename` holds the same.

        Args:
            filename: file to write; `.pt` becomes `.safetensors`.
            **info: metadata, JSON-serialisable; `theta0_hash` is ignored and computed from theta0.

        Returns:
            The content hash of theta.
        """
        return self._save(filename, self._kind, info, self.weights0())


class LinearizedImageEncoder(LinearizedEncoder):
    """A linearised CLIP image encoder, with the constructor of the public projects.

    Args:
        args: arguments of an `ImageEncoder`; required if `image_encoder` is None.
        keep_lang: ignored, since the text tower is not linearised.
        image_encoder: the encoder; its weights are the initial theta.
        init_encoder: the encoder whose weights are theta0; `image_encoder` itself if None.
    """

    def __init__(
        self,
        args: str | ModelSettings | None = None,
        keep_lang: bool = False,
        image_encoder: ImageEncoder | None = None,
        init_encoder: ImageEncoder | None = None,
    ) -> None:
        if image_encoder is None:
            if args is None:
                raise ValueError("expected args or image_encoder, got neither")
            image_encoder = ImageEncoder(args, keep_lang=False)
        init = None if init_encoder is None else _without_text(init_encoder)
        super().__init__(_without_text(image_encoder), init)

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self.identity()

    def standard(self) -> ImageEncoder:
        """A copy of the encoder at theta, not linearised."""
        encoder = super().standard()
        assert isinstance(encoder, ImageEncoder)
        return encoder

    @classmethod
    def load(cls, filename: str | Path, *, model_name: str | None = None) -> LinearizedImageEncoder:
        """Reads a linearised encoder; a standard checkpoint is linearised at its weights.

        Args:
            filename: the file.
            model_name: the model's name; None for the one in the file.
        """
        checkpoint = load_checkpoint(filename, kinds=ENCODERS, model=model_name)
        encoder = ImageEncoder.like(checkpoint, filename, model_name)
        encoder.load_weights(checkpoint.theta0 or checkpoint.theta)
        linear = cls(image_encoder=encoder)
        linear.load_weights(checkpoint.theta)
        return linear


ImageEncoders = ImageEncoder | LinearizedImageEncoder


@overload
def linearized(encoder: ImageEncoders) -> LinearizedImageEncoder: ...
@overload
def linearized(encoder: ModuleEncoder) -> LinearizedEncoder: ...
@overload
def linearized(encoder: Encoder) -> LinearEncoder: ...
def linearized(encoder: Encoder) -> LinearEncoder:
    """The linearisation of an encoder at its own weights; a linear encoder is returned as it is.

    Raises:
        TypeError: if the encoder is not a `ModuleEncoder`.
    """
    if is_linear(encoder):
        return encoder
    if isinstance(encoder, ImageEncoder):
        return LinearizedImageEncoder(image_encoder=encoder)
    if isinstance(encoder, ModuleEncoder):
        return LinearizedEncoder(encoder)
    raise TypeError(
        f"expected an encoder that subclasses ModuleEncoder, got {type(encoder).__name__}; "
        "linearise any other module with LinearizedModel"
    )


@overload
def standard(encoder: ImageEncoders) -> ImageEncoder: ...
@overload
def standard(encoder: Encoder) -> Encoder: ...
def standard(encoder: Encoder) -> Encoder:
    """The encoder at its theta, not linearised; a standard encoder is returned as it is."""
    return encoder.standard() if is_linear(encoder) else encoder


def _without_text(encoder: ImageEncoder) -> ImageEncoder:
    """The encoder reduced to its vision tower, sharing its weights."""
    if isinstance(encoder.model, VisionTower):
        return encoder
    bare = copy.copy(encoder)
    bare._modules = {"model": VisionTower(encoder.model.visual)}
    return bare
