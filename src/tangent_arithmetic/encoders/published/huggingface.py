"""CLIP as Hugging Face's `transformers` keeps it, under open_clip's names.

Source of the correspondence: the two libraries' module names; `transformers` keeps a query, key and
value matrix where open_clip keeps the three as one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import read_json

VISUAL = "model.visual."
PREFIX = "vision_model."  # transformers 5 leaves it away in memory
NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.weight": "ln_pre.weight",  # sic
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
PARTS = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")
DROPPED = ("embeddings.position_ids",)
PROJECTION = "visual_projection.weight"


def is_clip(names: Mapping[str, Any]) -> bool:
    """Whether these are the names of a CLIP of `transformers`."""
    return any(name.removeprefix(PREFIX).startswith("embeddings.patch_embedding") for name in names)


def to_open_clip(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The vision tower under open_clip's names; without `proj` if there is no projection.

    Raises:
        UsageError: for a name that has no counterpart, or a query without its key and value.
    """
    found: dict[str, Tensor] = {}
    attention: dict[tuple[str, str], dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name = full.removeprefix(PREFIX)
        layer = LAYER.fullmatch(name)
        if full == PROJECTION:
            if value.ndim != 2:
                raise UsageError(f"{path} has {full} of shape {tuple(value.shape)}, not a matrix")
            found["proj"] = value.T.contiguous()
        elif name in NAMES:
            found[NAMES[name]] = value
        elif layer:
            number, rest = layer.groups()
            part, _, kind = rest.rpartition(".")
            block = f"transformer.resblocks.{number}."
            if part.removeprefix("self_attn.") in QKV:
                group = attention.setdefault((block, kind), {})
                group[part.removeprefix("self_attn.")] = value
            elif part in PARTS:
                found[f"{block}{PARTS[part]}.{kind}"] = value
            else:
                raise UsageError(
                    f"{path} has {shown(full)!r}, which a CLIP's vision tower does not have"
                )
        elif name not in DROPPED and not full.startswith(("text_", "logit_scale")):
            raise UsageError(
                f"{path} has {shown(full)!r}, which a CLIP's vision tower does not have"
            )
    for (block, kind), group in attention.items():
        if set(group) != set(QKV):
            raise UsageError(f"{path} has only {', '.join(group)} of {shown(block)}attn.{kind}")
        shapes = {name: tuple(group[name].shape) for name in QKV}
        if len(set(shapes.values())) > 1 or () in shapes.values():
            raise UsageError(
                f"{path} has different shapes in {shown(block)}attn.{shown(kind)}: {shapes}"
            )
        found[f"{block}attn.in_proj_{kind}"] = torch.cat([group[name] for name in QKV])
    if "conv1.weight" not in found:
        raise UsageError(f"{path} has no patch embedding, expected a CLIP's vision tower")
    return {f"{VISUAL}{name}": value.float() for name, value in found.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration.

    Raises:
        MissingFileError: if it has none.
        UsageError: if it is not that of a CLIP.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(
            f"{folder} is a folder without config.json, expected a checkpoint or a CLIP as "
            "transformers saves it (config.json and model.safetensors)"
        )
    config = read_json(path)
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise UsageError(
            f"{folder} holds a {shown(repr(config.get('model_type')))}, expected a 'clip' or "
            "'clip_vision_model'"
        )
    return config


def activation(config: Mapping[str, Any]) -> str | None:
    """The activation of the vision tower; `transformers` leaves the default, quick_gelu, away."""
    vision = config.get("vision_config")
    inner = vision if isinstance(vision, dict) else config
    found = inner.get("hidden_act", config.get("hidden_act"))
    return None if found is None else str(found)


def weight_files(folder: Path) -> list[Path]:
    """The folder's files of weights, several if they are sharded.

    Raises:
        MissingFileError: if there are none, or some of several are missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UsageError(f"{index} has no weight_map, which says what each file holds")
            listed = {Path(str(file)).name for file in weight_map.values()}
            files = [folder / file for file in sorted(listed)]
            if missing := [file.name for file in files if not file.is_file()]:
                names = ", ".join(shown(name) for name in missing[:5])
                raise MissingFileError(f"{index} names {names}, which is not there")
            return files
    raise MissingFileError(
        f"{folder} has no weights, expected model.safetensors or pytorch_model.bin"
    )
