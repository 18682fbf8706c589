"""The linearisation of a CLIP image encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.encoders.clip import check_fits, model_in
from tangent_arithmetic.encoders.images import ImageEncoder, ModelSettings, VisionTower
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.storage import statedict
from tangent_arithmetic.storage.checkpoints import ENCODERS, save_tensors
from tangent_arithmetic.tangent.linearized import LinearizedModel


class LinearizedImageEncoder(nn.Module):
    """A linearised CLIP image encoder with the manners of an `ImageEncoder`.

    Args:
        args: what to build an `ImageEncoder` from, if none is given.
        keep_lang: accepted as `ImageEncoder` does; the text tower takes no part in the expansion.
        image_encoder: the encoder; its weights are the initial theta.
        init_encoder: the encoder whose weights are theta0; `image_encoder` itself if None.
    """

    train_preprocess: Transform | None
    val_preprocess: Transform | None

    def __init__(
        self,
        args: str | ModelSettings | None = None,
        keep_lang: bool = False,
        image_encoder: ImageEncoder | None = None,
        init_encoder: ImageEncoder | None = None,
    ) -> None:
        super().__init__()
        if image_encoder is None:
            if args is None:
                raise ValueError("expected args or image_encoder, got neither")
            image_encoder = ImageEncoder(args, keep_lang=False)
        tower = _without_text(image_encoder)
        init = None if init_encoder is None else _without_text(init_encoder)
        self.model_name = tower.model_name
        self.train_preprocess = tower.train_preprocess
        self.val_preprocess = tower.val_preprocess
        self.cache_dir = tower.cache_dir
        self.model = LinearizedModel(tower, init)

    def forward(self, images: Tensor) -> Tensor:
        """Linearised features of images, shape (batch, features)."""
        features: Tensor = self.model(images)
        return features

    def weights(self) -> dict[str, Tensor]:
        """Theta and the persistent buffers, under the names of the standard encoder."""
        return self.model.weights()

    def weights0(self) -> dict[str, Tensor]:
        """theta0 and the persistent buffers, under the names of the standard encoder."""
        return self.model.weights0()

    def theta0(self) -> dict[str, Tensor]:
        """The point of expansion: parameters by name, not copied."""
        return self.model.theta0()

    def identity(self) -> str:
        """The model's name."""
        return self.model_name

    def standard(self) -> ImageEncoder:
        """The encoder at theta, not linearised: a copy."""
        encoder = ImageEncoder.without_weights(self.model_name)
        encoder.load_weights(self.weights())
        return encoder

    def tangents(
        self, images: Tensor, vectors: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """f(x; theta0) and J(x; theta0) tau for each vector, see `LinearizedModel.tangents`."""
        return self.model.tangents(images, vectors)

    def displacement(self) -> dict[str, Tensor]:
        """`theta - theta0` by name of parameter, in at least float32."""
        with torch.no_grad():
            return statedict.difference(self.model.theta(), self.model.theta0())

    def load_weights(self, theta: Mapping[str, Tensor]) -> None:
        """Copies theta into the encoder; theta0 stays.

        Raises:
            ValueError: if names or shapes differ, listing all differences.
        """
        what = f"weights of {self.model_name} and the checkpoint"
        statedict.copy_into(self.weights(), theta, what)

    def save(self, filename: str | Path, **info: Any) -> str:
        """Writes theta, and theta0 unless a zero-shot file near `filename` holds the same.

        Args:
            filename: file to write; `.pt` becomes `.safetensors`.
            **info: facts to keep with the weights.

        Returns:
            The content hash of theta.
        """
        info.pop("theta0_hash", None)  # follows from theta0
        return save_tensors(
            filename,
            self.weights(),
            "linearized_image_encoder",
            theta0=self.weights0(),
            info={"model": self.model_name, **info},
        )

    @classmethod
    def load(
        cls, filename: str | Path, made_by: str | None = None, model_name: str | None = None
    ) -> LinearizedImageEncoder:
        """Reads a linearised encoder; a standard checkpoint is linearised at its own weights.

        Args:
            filename: the file.
            made_by: the command that makes the file, for the message if it is missing.
            model_name: the model's name; None for what the file says.
        """
        state = load_checkpoint(filename, made_by, ENCODERS, model_name)
        name = model_name or model_in(state.info, state.theta, filename)
        check_fits(name, state.theta, filename)
        init = ImageEncoder.without_weights(name)
        init.load_weights(state.theta if state.theta0 is None else state.theta0)
        encoder = cls(image_encoder=init)
        encoder.load_weights(state.theta)
        return encoder


ImageEncoders = ImageEncoder | LinearizedImageEncoder


def linearized(encoder: ImageEncoders) -> LinearizedImageEncoder:
    """The linearisation of an encoder at its own weights; a linear one itself."""
    if isinstance(encoder, LinearizedImageEncoder):
        return encoder
    return LinearizedImageEncoder(image_encoder=encoder)


def standard(encoder: ImageEncoders) -> ImageEncoder:
    """The encoder at its theta, not linearised; a standard one itself."""
    return encoder.standard() if isinstance(encoder, LinearizedImageEncoder) else encoder


def _without_text(encoder: ImageEncoder) -> ImageEncoder:
    """The encoder; one built with `keep_lang` as a copy reduced to its vision tower."""
    if isinstance(encoder.model, VisionTower):
        return encoder
    bare = copy.copy(encoder)
    bare._modules = {"model": VisionTower(encoder.model.visual)}
    return bare
