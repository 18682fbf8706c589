"""Backbones of your own: what a callable `MODULE:FACTORY` returns."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tangent_arithmetic.encoders.backbones.building import Backbone, unavailable
from tangent_arithmetic.encoders.backbones.names import PYTHON, BackboneName
from tangent_arithmetic.encoders.backbones.transforms import imagenet
from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.encoders.built import code_of
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.factories import imported
from tangent_arithmetic.tangent.copies import copy_of
from tangent_arithmetic.tangent.state import uncompiled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Described:
    """A transform, and the recipe that identifies it: any JSON value."""

    transform: Transform
    recipe: Any

    @property
    def reads_texts(self) -> bool:
        """Whether the transform reads texts, see `data.texts`."""
        return bool(getattr(self.transform, "reads_texts", False))

    def __call__(self, image: Any) -> Any:
        """The transformed image."""
        return self.transform(image)


def build(name: BackboneName, weights: bool) -> Backbone:
    """The module of a factory, called without arguments; the module itself is not changed.

    The factory returns the module, or (module, preprocess), or (module, train_preprocess,
    preprocess), where a preprocess maps a PIL image to a tensor. Without one, the transforms of
    timm's configuration are used if the module has one, those of ImageNet otherwise.

    Args:
        name: the factory.
        weights: ignored: the factory decides.

    Raises:
        UsageError: if it cannot be called, or returns something else, weights without values, or a
            module that cannot be copied, see `copy_of`.
    """
    place = f"{PYTHON}{name.architecture}"
    factory = imported(name.architecture)
    with unavailable(place, False):
        value = factory()
    module, *given = value if isinstance(value, tuple) else (value,)
    if not isinstance(module, nn.Module) or len(given) > 2 or not all(map(callable, given)):
        got = [type(one).__name__ for one in (module, *given)]
        raise UsageError(
            f"{place} returned {', '.join(got)}; expected a torch.nn.Module, (module, preprocess) "
            "or (module, train_preprocess, preprocess)"
        )
    module = _copied(place, module)
    code = code_of(module, factory)
    if not given:
        given = list(_default(place, module))
    train, val = given[0], given[-1]
    return Backbone(module, _identified(train, code, True), _identified(val, code, False))


def _copied(place: str, module: nn.Module) -> nn.Module:
    """A copy of a module in float32 and eval mode; a factory may return the same module twice."""
    module = uncompiled(module)
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(value) or value.is_meta:
            remedy = (
                "pass a batch through the module"
                if is_lazy(value)
                else "build it without the meta device, or call to_empty and load its weights"
            )
            raise UsageError(
                f"{place} returned a module whose {name} has no values yet; in the factory, "
                f"{remedy}"
            )
    copied = copy_of(module).eval()
    dtypes = {value.dtype for value in copied.parameters() if value.is_floating_point()}
    if others := dtypes - {torch.float32}:
        logger.info("%s: weights of %s become float32", place, ", ".join(map(str, others)))
        copied.float()
    return copied


def _default(place: str, module: nn.Module) -> tuple[Transform, Transform]:
    if getattr(module, "pretrained_cfg", None):
        from tangent_arithmetic.encoders.backbones.timm_models import with_transforms

        made = with_transforms(module)
        return made.train_preprocess, made.val_preprocess
    logger.info(
        "%s gives no preprocessing: 224 x 224 pixels, normalised as for ImageNet; return (module, "
        "preprocess) for another",
        place,
    )
    return imagenet()


def _identified(transform: Transform, code: str | None, training: bool) -> Transform:
    """The transform, with a recipe if everything that it depends on is known.

    The recipe covers the sources of the module's classes, since weights alone do not determine
    features.
    """
    own = getattr(transform, "recipe", None)
    facts = _parts(transform) if own is None else own
    if facts is None or code is None:
        return transform
    return Described(transform, {"python": facts, "code": code, "training": training})


def _parts(transform: Any) -> str | None:
    """A description of a composition of torchvision's transforms; None for anything else."""
    parts = getattr(transform, "transforms", None)
    if not isinstance(parts, list) or " at 0x" in repr(transform):
        return None
    known = all(type(part).__module__.startswith("torchvision.") for part in parts)
    return repr(transform) if known else None
