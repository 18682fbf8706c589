"""The encoder of a backbone: features of images or texts, standard or linear, saved and loaded."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tangent_arithmetic.encoders.backbones import (
    own,
    timm_models,
    torchvision_models,
    transformers_models,
)
from tangent_arithmetic.encoders.backbones.building import Backbone
from tangent_arithmetic.encoders.backbones.names import (
    PYTHON,
    TEXT_TOWER,
    TIMM,
    TORCHVISION,
    TRANSFORMERS,
    BackboneName,
)
from tangent_arithmetic.encoders.base import BUILT, ModuleEncoder, check_shapes
from tangent_arithmetic.encoders.built import PREPROCESS, say
from tangent_arithmetic.encoders.clip import canonical
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.encoders.loading import load_checkpoint
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import Checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float, Int

KIND = "vision_backbone"
KINDS = (KIND, f"linearized_{KIND}")
MODEL = "model."
SOURCES = {
    TIMM: timm_models.build,
    TORCHVISION: torchvision_models.build,
    PYTHON: own.build,
    TRANSFORMERS: transformers_models.build,
    TEXT_TOWER: transformers_models.build_tower,
}
_named: set[str] = set()  # models built in this process at the user's request


def build(name: str, weights: bool = True) -> Backbone:
    """The backbone of this name, in eval mode.

    Args:
        name: see `BackboneName`.
        weights: whether to load its pre-trained weights.

    Raises:
        UsageError: if it is unknown, cannot be built, or its weights are unavailable.
    """
    parsed = BackboneName.parse(name)
    backbone = SOURCES.get(parsed.scheme, timm_models.build_repository)(parsed, weights)
    backbone.module.eval()
    return backbone


class BackboneEncoder(ModuleEncoder):
    r"""A backbone of timm, torchvision, transformers or your own as an encoder, \(f(x; \theta)\).

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `python:MODULE:FACTORY`, or `hf-hub:ORG/NAME` or
            `local-dir:FOLDER` with a model of timm's; `transformers:NAME_OR_FOLDER` and
            `text-tower:CLIP` read texts. See `BackboneName`.
        weights: whether to load the pre-trained weights.

    Attributes:
        model_name: the name, independent of the working directory.
        model: the module; its output is the features.
        classifiers: names of the layers that it was built without, see `Backbone`.
    """

    kind = KIND

    def __init__(self, name: str, weights: bool = True) -> None:
        super().__init__()
        self.model_name = canonical(name)
        backbone = build(name, weights)
        self.model, self.classifiers = backbone.module, backbone.classifiers
        self.train_preprocess = backbone.train_preprocess
        self.val_preprocess = backbone.val_preprocess
        _named.add(self.model_name)

    def forward(
        self, inputs: Float[Tensor, "batch channels height width"] | Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch features"]:
        """Pooled features of images, or of texts as token ids; not normalised.

        Raises:
            UsageError: if the module returns anything but one vector per example, in the precision
                of the images.
        """
        features = self.model(inputs)
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = type(features).__name__
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {got}"
            raise UsageError(
                f"{self.model_name} returns {got}; expected features of shape (batch, features): "
                "let the module's forward pool its output"
            )
        changed = inputs.is_floating_point() and features.dtype != inputs.dtype
        if changed and not torch.is_autocast_enabled(features.device.type):
            raise UsageError(
                f"{self.model_name} returns features of {features.dtype}, expected {inputs.dtype}, "
                "as its images: let the module's forward not change the precision"
            )
        return features

    def identity(self) -> str:
        """The model's name."""
        return self.model_name

    def built(self) -> dict[str, Any]:
        """The recipe of its preprocessing, if known."""
        recipe = getattr(self.val_preprocess, "recipe", None)
        return {} if recipe is None else {PREPROCESS: recipe}

    @classmethod
    def load(cls, filename: str | Path, model_name: str | None = None) -> BackboneEncoder:
        """Reads an encoder, standard or linear, at theta.

        Args:
            filename: the file.
            model_name: the model's name; None for the one in the file.
        """
        checkpoint = load_checkpoint(filename, kinds=KINDS)
        encoder = cls.like(checkpoint, filename, model_name)
        encoder.load_weights(checkpoint.theta)
        return encoder

    @classmethod
    def like(
        cls, checkpoint: Checkpoint, path: str | Path, model_name: str | None = None
    ) -> BackboneEncoder:
        """An encoder with arbitrary weights, of the architecture of a checkpoint.

        Args:
            checkpoint: the checkpoint.
            path: its file, for messages.
            model_name: the model's name; None for the one in the checkpoint.

        Raises:
            UsageError: if the checkpoint belongs to another model, or its model is not trusted.
        """
        stated = str(checkpoint.info.get("model", ""))
        if model_name is not None and stated != canonical(model_name):
            raise UsageError(
                f"{path} holds weights of {shown(stated) or 'an unknown model'}, expected "
                f"{model_name}; add --model={shown(stated)}"
            )
        name = model_name or _trusted(stated, path)
        if not name.startswith(PYTHON):  # a factory is called once; its weights are checked later
            check_shapes(_shapes(name), checkpoint.theta, name, path)
        encoder = cls(name, weights=False)
        check_shapes(_shapes_of(encoder), checkpoint.theta, name, path)
        _compare(checkpoint.info.get(BUILT), encoder, path)
        return encoder


def _compare(recorded: object, encoder: BackboneEncoder, path: str | Path) -> None:
    """Warns, once, if a file records another preprocessing, or code, than the encoder has."""
    now = json.loads(json.dumps(encoder.built()))
    if isinstance(recorded, dict) and recorded != now:
        say(
            f"{path} was made with other preprocessing or code than {encoder.model_name} has now: "
            f"its features may differ. It records {shown(recorded, 300)}, expected "
            f"{shown(now, 300)}"
        )


def load_linear(filename: str | Path, model_name: str | None = None) -> LinearizedEncoder:
    """Reads a linearised backbone at theta; a standard checkpoint is linearised at its weights."""
    checkpoint = load_checkpoint(filename, kinds=KINDS)
    encoder = BackboneEncoder.like(checkpoint, filename, model_name)
    encoder.load_weights(checkpoint.theta0 or checkpoint.theta)
    linear = LinearizedEncoder(encoder)
    linear.load_weights(checkpoint.theta)
    return linear


@functools.cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights, as in our checkpoints, without storage if possible."""
    try:
        with torch.device("meta"):
            module = build(name, weights=False).module
    except UsageError:  # RegNet draws its weights in a way that the meta device does not know
        module = build(name, weights=False).module
    return {f"{MODEL}{key}": tuple(value.shape) for key, value in module.state_dict().items()}


def _shapes_of(encoder: BackboneEncoder) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in encoder.weights().items()}


def _trusted(name: str, source: str | Path) -> str:
    """The name in a file, if building it neither executes code nor uses the network.

    Raises:
        UsageError: otherwise, unless the user has named the model in this process.
    """
    if name in _named or name.startswith((TIMM, TORCHVISION)):
        return name
    raise UsageError(
        f"{source} states the model {shown(name) or '(none)'}, which "
        + ("executes code" if name.startswith(PYTHON) else "needs other files or the network")
        + "; names in files are not trusted with these. If it is right, name the model yourself: "
        "--model=NAME, or BackboneEncoder.load(FILE, NAME)"
    )
