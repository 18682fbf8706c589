"""Converts CLIP checkpoints of Hugging Face's `transformers` to open_clip's parameter names.

`transformers` stores separate query, key and value matrices, open_clip their concatenation.

Source: the two libraries' module names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.encoders.built import ACTIVATION, GELU, PREPROCESS, QUICK_GELU
from tangent_arithmetic.encoders.clip import VISUAL
from tangent_arithmetic.encoders.published.recorded import of_processor
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import read_json

PREFIX = "vision_model."  # transformers 5 drops it in memory
NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.weight": "ln_pre.weight",  # [sic]
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
QKV = ("q_proj", "k_proj", "v_proj")
DROPPED = ("embeddings.position_ids",)
PROJECTION = "visual_projection.weight"
CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the latter since version 5
KINDS = ("clip", "clip_vision_model")
ACTIVATIONS = {"gelu": GELU, "quick_gelu": QUICK_GELU}


def is_clip(names: Mapping[str, Any]) -> bool:
    """Whether these are the parameter names of a CLIP of `transformers`."""
    return any(name.removeprefix(PREFIX).startswith("embeddings.patch_embedding") for name in names)


def to_open_clip(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The vision tower under open_clip's names; without `proj` if there is no projection.

    Raises:
        UsageError: if a name has no counterpart, or queries, keys and values do not match.
    """
    tower: dict[str, Tensor] = {}
    attention: dict[tuple[str, str], dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name = full.removeprefix(PREFIX)
        layer = LAYER.fullmatch(name)
        if full == PROJECTION:
            if value.ndim != 2:
                got = tuple(value.shape)
                raise UsageError(f"{path}: expected {full} to be a matrix, got {got}")
            tower["proj"] = value.T.contiguous()
        elif name in NAMES:
            tower[NAMES[name]] = value
        elif layer:
            number, rest = layer.groups()
            part, _, kind = rest.rpartition(".")
            block = f"transformer.resblocks.{number}."
            if part.removeprefix("self_attn.") in QKV:
                group = attention.setdefault((block, kind), {})
                group[part.removeprefix("self_attn.")] = value
            elif part in PARTS:
                tower[f"{block}{PARTS[part]}.{kind}"] = value
            else:
                raise _unexpected(path, full)
        elif name not in DROPPED and not full.startswith(("text_", "logit_scale")):
            raise _unexpected(path, full)
    for (block, kind), group in attention.items():
        if set(group) != set(QKV):
            raise UsageError(
                f"{path}: expected {', '.join(QKV)} for {shown(block)}attn.{kind}, got only "
                f"{', '.join(group)}"
            )
        shapes = {name: tuple(group[name].shape) for name in QKV}
        if len(set(shapes.values())) > 1 or () in shapes.values():
            raise UsageError(
                f"{path}: expected equal shapes in {shown(block)}attn.{shown(kind)}, got {shapes}"
            )
        tower[f"{block}attn.in_proj_{kind}"] = torch.cat([group[name] for name in QKV])
    if "conv1.weight" not in tower:
        raise UsageError(f"{path}: expected a CLIP's vision tower, got no patch embedding")
    return {f"{VISUAL}{name}": value.float() for name, value in tower.items()}


def _unexpected(path: Path, name: str) -> UsageError:
    return UsageError(f"{path}: unexpected tensor {shown(name)!r} in a CLIP's vision tower")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a CLIP in a folder.

    Raises:
        MissingFileError: if there is none.
        UsageError: if it belongs to another kind of model.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingFileError(
            f"{folder} is a folder without config.json; expected a checkpoint file, or a CLIP "
            "saved by transformers (config.json and model.safetensors)"
        )
    config = read_json(path)
    if config.get("model_type") not in KINDS:
        raise UsageError(
            f"{folder} holds a {shown(repr(config.get('model_type')))}, expected a 'clip' or "
            "'clip_vision_model'"
        )
    return config


def config_beside(file: Path) -> dict[str, Any] | None:
    """The configuration of a CLIP in the folder of a file of weights; None if there is none."""
    path = file.parent / CONFIG
    config = read_json(path) if path.is_file() else {}
    return config if config.get("model_type") in KINDS else None


def built(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The activation and the preprocessing of the CLIP in a folder, see `encoders.built`."""
    name = activation(config)
    facts: dict[str, Any] = {ACTIVATION: ACTIVATIONS.get(name, name)}
    for path in (folder / file for file in PROCESSORS):
        if path.is_file() and (preprocess := of_processor(read_json(path))):
            return {**facts, PREPROCESS: preprocess}
    return facts


def activation(config: Mapping[str, Any]) -> str:
    """The vision tower's activation; by default that of `transformers`, quick_gelu."""
    vision = config.get("vision_config")
    inner = vision if isinstance(vision, dict) else config
    return str(inner.get("hidden_act", config.get("hidden_act")) or "quick_gelu")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder; several if they are sharded.

    Raises:
        MissingFileError: if there are none, or a shard is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UsageError(f"{index}: expected a weight_map from tensors to files, got none")
            listed = {Path(str(file)).name for file in weight_map.values()}
            files = [folder / file for file in sorted(listed)]
            if missing := [file.name for file in files if not file.is_file()]:
                names = ", ".join(shown(name) for name in missing[:5])
                raise MissingFileError(f"{index} lists missing files: {names}")
            return files
    others = [
        each.name for each in sorted(folder.iterdir()) if each.suffix in (".safetensors", ".bin")
    ]
    way_out = f", or name one of its files: {', '.join(map(shown, others[:5]))}" if others else ""
    raise MissingFileError(
        f"no weights in {folder}; expected model.safetensors or pytorch_model.bin{way_out}"
    )
