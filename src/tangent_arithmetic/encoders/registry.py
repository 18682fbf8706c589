"""The kinds of encoder checkpoints, and how each is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from tangent_arithmetic.encoders.backbones import encoder as backbones
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import read_facts, resolve
from tangent_arithmetic.encoders.mlp import BackBone
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.registry import Registry
from tangent_arithmetic.storage.checkpoints import BACKBONE
from tangent_arithmetic.tangent.linearized import LinearizedModel

Load = Callable[[Path], nn.Module]

_LOADERS: Registry[tuple[Load, Load]] = Registry("kind of encoder checkpoint")


def register_encoder(kind: str, load_standard: Load, load_linear: Load) -> None:
    """Registers how checkpoints of a kind and of its linearisation are loaded.

    Args:
        kind: the kind of a standard checkpoint, such as "text_encoder"; that of a linear one is
            "linearized_text_encoder".
        load_standard: reads either kind as a standard encoder at theta.
        load_linear: reads either kind as a linearised encoder at theta, expanded at theta0, or at
            theta for a standard checkpoint.

    Raises:
        UsageError: if the kind is already registered.
    """
    for name in (kind, f"linearized_{kind}"):
        _LOADERS.add(name, (load_standard, load_linear))


def encoder_kinds() -> tuple[str, ...]:
    """All registered kinds of checkpoints."""
    return tuple(_LOADERS)


def load_standard(path: str | Path) -> nn.Module:
    """The standard encoder, at theta, of a checkpoint of any registered kind.

    Raises:
        UsageError: if the file is not an encoder's checkpoint, or damaged.
    """
    return _load(path, 0)


def load_linear(path: str | Path) -> nn.Module:
    """The linearised encoder of a checkpoint of any registered kind; as `load_standard`."""
    return _load(path, 1)


def _load(path: str | Path, which: int) -> nn.Module:
    path = resolve(path)
    kind = read_facts(path)["kind"]
    if kind not in _LOADERS:
        raise UsageError(
            f"{path} holds a {shown(kind)}, expected one of {', '.join(_LOADERS)}; add a kind of "
            "your own with register_encoder"
        )
    return _LOADERS[kind][which](path)


register_encoder(ImageEncoder.kind, ImageEncoder.load, LinearizedImageEncoder.load)
register_encoder(backbones.KIND, backbones.BackboneEncoder.load, backbones.load_linear)
register_encoder(BACKBONE, BackBone.load, lambda path: LinearizedModel(BackBone.load(path)))
