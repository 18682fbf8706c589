"""Models of open_clip, timm, torchvision and transformers by name, with random weights and inputs.

A name is looked for in this order. For transformers it is a model type with the settings of its
configuration, such as `bert:num_hidden_layers=6,hidden_size=384`.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.data.embedded.model import register
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.runtime.errors import UsageError

TOKENS = 128  # of a text
Inputs = dict[str, Tensor]


def build(name: str, batch_size: int) -> tuple[nn.Module, tuple[Tensor, ...], Inputs]:
    """A model and a batch of its inputs, positional and by keyword.

    Raises:
        UsageError: if no library has a model of this name.
    """
    torch.manual_seed(0)
    for library in (_open_clip, _timm, _torchvision, _transformers):
        found: tuple[nn.Module, tuple[Tensor, ...], Inputs] | None = library(name, batch_size)
        if found is not None:
            return found
    raise UsageError(
        f"--model={name}: expected a model of open_clip, timm or torchvision, or a model type of "
        "transformers with settings, such as bert:num_hidden_layers=6,hidden_size=384"
    )


def _images(count: int, size: int) -> tuple[Tensor]:
    return (torch.randn(count, 3, size, size),)


def image_size(name: str) -> int | None:
    """The side of the images that a model of open_clip reads, in pixels; None for others."""
    import open_clip

    register()  # ViT-Nano-8
    config: Any = open_clip.get_model_config(name)
    return None if config is None else int(config["vision_cfg"]["image_size"])


def _open_clip(name: str, count: int) -> Any:
    size = image_size(name)
    if size is None:
        return None
    return ImageEncoder.without_weights(f"{name}__init__"), _images(count, size), {}


def _timm(name: str, count: int) -> Any:
    try:
        import timm
    except ImportError:
        return None
    if not timm.is_model(name):
        return None
    model: Any = timm.create_model(name, pretrained=False)
    return model, _images(count, int(model.default_cfg["input_size"][-1])), {}


def _torchvision(name: str, count: int) -> Any:
    from torchvision import models

    if name not in models.list_models(models):
        return None
    return models.get_model(name, weights=None), _images(count, 224), {}


def _transformers(name: str, count: int) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoModel
    except ImportError:
        return None
    kind, _, settings = name.partition(":")
    if kind not in CONFIG_MAPPING:
        return None
    pairs = dict(setting.split("=", 1) for setting in settings.split(",") if setting)
    config = CONFIG_MAPPING[kind](**{key: ast.literal_eval(value) for key, value in pairs.items()})
    config.use_cache = False
    ids = torch.randint(3, config.vocab_size, (count, TOKENS))
    inputs = {"input_ids": ids}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    auto: Any = AutoModel
    return auto.from_config(config), (), inputs
