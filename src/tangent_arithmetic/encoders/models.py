"""Encoders by name: the one place that tells CLIPs from backbones and from encoders of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tangent_arithmetic.data.suites import EMBEDDED_MODEL, READS_TEXT
from tangent_arithmetic.encoders.backbones import encoder as backbones
from tangent_arithmetic.encoders.backbones.building import surplus
from tangent_arithmetic.encoders.backbones.encoder import BackboneEncoder
from tangent_arithmetic.encoders.backbones.names import SCHEMES, BackboneName, is_backbone
from tangent_arithmetic.encoders.base import ModuleEncoder, check_shapes
from tangent_arithmetic.encoders.clip import ClipName
from tangent_arithmetic.encoders.images import ImageEncoder, ModelSettings
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts, resolve
from tangent_arithmetic.storage.checkpoints import read_header
from tangent_arithmetic.storage.wrappers import read_weights

STANDARD = (ImageEncoder.kind, BackboneEncoder.kind)  # kinds of checkpoints of standard encoders
IMAGE_ENCODERS = tuple(name for kind in STANDARD for name in (kind, f"linearized_{kind}"))


def has_text_tower(name: str) -> bool:
    """Whether a model can build zero-shot heads, by its name."""
    return reads_texts(name) or not is_backbone(name)


def reads_texts(name: str) -> bool:
    """Whether a model is an encoder of texts, by its name."""
    return name.startswith(READS_TEXT)


def is_random(name: str) -> bool:
    """Whether a model's name asks for random weights."""
    return name.endswith("__init__")


def is_at_hand(name: str) -> bool:
    """Whether a model's own weights come with this package."""
    return name.partition("__")[0] == EMBEDDED_MODEL


def weights_file(name: str) -> Path | None:
    """The file or folder of a model's weights, if its name contains one."""
    if is_backbone(name) and name.startswith(SCHEMES):
        return BackboneName.parse(name).file
    parsed = ClipName.parse(name)
    return parsed.file or parsed.folder


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws the random weights of a model from a seed, and restores the generator on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def pretrained(settings: ModelSettings, seed: int = 0) -> ModuleEncoder:
    """The pre-trained encoder of these settings.

    Args:
        settings: `model`, its name; `load`, a checkpoint of other weights; the folder of downloads.
        seed: of random weights.

    Raises:
        UsageError: if the model is unknown, or its weights are unavailable or do not fit it.
    """
    with seeded(seed):
        if not is_backbone(settings.model):
            return ImageEncoder(settings)
        paths = [settings.load] if isinstance(settings.load, str) else settings.load or []
        if not paths:
            return BackboneEncoder(settings.model)
        return _loaded(settings.model, resolve(paths[0]))


def _loaded(name: str, path: Path) -> BackboneEncoder:
    """A backbone with the weights of a checkpoint of ours, or of any file with its names."""
    if read_header(path) is not None:
        return BackboneEncoder.load(path, name)
    tensors = read_weights(path)
    encoder = BackboneEncoder(name, weights=False)
    own = {key.removeprefix(backbones.MODEL): v for key, v in encoder.weights().items()}
    if not own.keys() <= tensors.keys():
        tensors = _inside(tensors, next(iter(own)))
    more = surplus(tensors, own, encoder.classifiers)
    named = {key: tensors[key] for key in (*own, *more) if key in tensors}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    check_shapes(shapes, named, name, path)
    theta = {f"{backbones.MODEL}{key}": value for key, value in named.items()}
    encoder.load_weights(theta)
    return encoder


def _inside(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of the encoder in a file of an encoder or a classifier of ours.

    An encoder has its module as `model`, a classifier its encoder as `image_encoder`.

    Args:
        tensors: of the file.
        name: of a tensor in the module.
    """
    full = f"{backbones.MODEL}{name}"
    prefixes = [key.removesuffix(name) for key in tensors if f".{key}".endswith(f".{full}")]
    if backbones.MODEL in prefixes:
        prefixes = [backbones.MODEL]
    if len(prefixes) != 1:  # none, or several models
        return tensors
    prefix = prefixes[0]
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def load_image_encoder(name: str, path: Path) -> ModuleEncoder:
    """The standard encoder of a model with the weights of a checkpoint.

    Raises:
        UsageError: if the checkpoint belongs to another model.
    """
    return BackboneEncoder.load(path, name) if is_backbone(name) else ImageEncoder.load(name, path)


def is_standard(path: str, name: str) -> bool:
    """Whether a file holds a standard encoder: one of ours, or weights of the model `name`."""
    resolved = resolve(path)
    if is_backbone(name) and read_header(resolved) is None:
        return True  # its names and shapes are checked when it is read
    return read_facts(resolved, name)["kind"] in STANDARD


def weights_in(path: Path) -> dict[str, Tensor]:
    """The weights theta in the checkpoint of an image encoder of any kind."""
    return load_checkpoint(path, kinds=IMAGE_ENCODERS).theta
