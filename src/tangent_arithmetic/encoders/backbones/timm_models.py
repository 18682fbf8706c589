"""Backbones of timm: pooled features, and the transforms of the weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.backbones.building import (
    Backbone,
    check_size,
    surplus,
    unavailable,
)
from tangent_arithmetic.encoders.backbones.names import TIMM, BackboneName
from tangent_arithmetic.encoders.backbones.transforms import training, with_recipe
from tangent_arithmetic.encoders.published.huggingface import weight_files
from tangent_arithmetic.runtime.errors import UsageError, closest, shown, unknown
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.storage.wrappers import read_weights

PREFIX = 5  # at most so many tokens, of classes and registers, may or may not have a position


def build(name: BackboneName, weights: bool) -> Backbone:
    """A timm model by its name.

    Args:
        name: its architecture, `resnet50` or `resnet50.a1_in1k`.
        weights: whether to load its weights.

    Raises:
        UsageError: if it is unknown, or its weights are unavailable.
    """
    _check(name)
    own = weights and name.weights == ""
    with unavailable(f"{TIMM}{name.architecture}", own):
        module = _created(name.architecture, pretrained=own)
    if weights and name.file is not None:
        load_state(module, read_weights(name.file), name.file)
    return with_transforms(module)


def build_repository(name: BackboneName, weights: bool) -> Backbone:
    """A timm model from a repository or a folder: `config.json` and its weights.

    Raises:
        MissingFileError: if it is unavailable.
        UsageError: if its configuration and its weights do not match.
    """
    from timm.models import PretrainedCfg

    folder, place = name.folder(), f"{name.scheme}{name.architecture}"
    config, files = read_json(folder / "config.json"), weight_files(folder)
    architecture, options = config["architecture"], config.get("model_args") or {}
    stated: Any = config.get("pretrained_cfg") or config  # older files have its fields beside it
    known = PretrainedCfg.__dataclass_fields__
    settings: Any = {name: stated[name] for name in known if name in stated}
    settings["architecture"] = architecture
    if not isinstance(options, dict) or ":" in architecture or "/" in architecture:
        raise UsageError(
            f"{folder}/config.json is refused: architecture {shown(architecture)} with model_args "
            f"{shown(options)}; expected a name of timm's, and a mapping"
        )
    _check(BackboneName(TIMM, architecture, None))
    options = {name: value for name, value in options.items() if name != "num_classes"}
    with unavailable(place, False):
        with torch.device("meta"):
            check_size(_created(architecture, pretrained_cfg=settings, **options), files, place)
        module = _created(architecture, pretrained_cfg=settings, **options)
    if weights and name.weights is not None:
        load_state(module, {n: v for file in files for n, v in read_weights(file).items()}, folder)
    return with_transforms(module)


def _created(architecture: str, **options: Any) -> nn.Module:
    import timm

    module: nn.Module = timm.create_model(architecture, num_classes=0, **options)
    return module


def _check(name: BackboneName) -> None:
    """Raises a UsageError unless timm knows the architecture and the tag."""
    import timm

    base, _, tag = name.architecture.partition(".")
    if not timm.is_model(base):
        raise unknown("model of timm", base, closest(base, timm.list_models())[:5])
    if tag and name.architecture not in (known := timm.list_pretrained(f"{base}.*")):
        raise unknown(f"weights of {TIMM}{base}", tag, [one.partition(".")[2] for one in known])
    if name.weights and name.file is None:
        raise UsageError(
            f"{TIMM}{name.architecture}: there is no file of weights {shown(name.weights)}; "
            f"expected __pretrained__FILE, __init__ for random weights, or {TIMM}{base}.TAG for "
            "weights of timm's"
        )


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copies the weights of a file into a timm model; those of its classifier are left out.

    Args:
        module: the model, without a classifier.
        state: the weights.
        path: their file, for messages.

    Raises:
        UsageError: if weights of the model are missing or of another shape, or the file has more
            than these and a classifier's; lists them.
    """
    own, read, heads = module.state_dict(), state, _classifiers(module)
    if not own.keys() <= state.keys() or surplus(state, own, heads):
        state = _renamed(module, state)
    wrong = [
        f"{name}: {tuple(state[name].shape) if name in state else 'missing'}, expected "
        f"{tuple(value.shape)}"
        for name, value in own.items()
        if name not in state or state[name].shape != value.shape
    ]
    wrong += [f"{shown(name)}, which it lacks" for name in surplus(state, own, heads)]
    if state is not read:
        wrong += [f"{name}: {old}, expected {new}" for name, old, new in _interpolated(own, read)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        kind = type(module).__name__
        raise UsageError(f"{path} does not fit this {kind}: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict({name: state[name] for name in own})


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifiers, by its configuration."""
    stated: Any = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
    return (stated,) if isinstance(stated, str) else tuple(stated)


def _interpolated(
    own: Mapping[str, Tensor], read: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Positional embeddings that a file has for images of another size, which timm interpolates."""
    for name, value in own.items():
        if "pos" in name.rpartition(".")[2]:
            there = [v for n, v in read.items() if f".{n}".endswith(f".{name}")]
            spare = PREFIX * value.shape[-1]
            if there and all(abs(v.numel() - value.numel()) > spare for v in there):
                yield name, tuple(there[0].shape), tuple(value.shape)


def _renamed(module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights of the original projects under timm's names, by the model's own rule."""
    rule: Callable[..., Any] | None
    rule = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if rule is not None:
        with contextlib.suppress(Exception):  # written for other files: the check below says so
            renamed: Mapping[str, Tensor] = rule(dict(state), module)
            return renamed
    return state


def with_transforms(module: nn.Module) -> Backbone:
    """The model with the transforms of its configuration."""
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=module)  # type: ignore[no-untyped-call]
    val = with_recipe(
        create_transform(**config, is_training=False), {"timm": config, "training": False}
    )
    size = config["input_size"][1:]
    train = training(size, config["mean"], config["std"], config["interpolation"])
    return Backbone(module, train, val, _classifiers(module))
