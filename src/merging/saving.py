"""Merges straight into files: our checkpoints, folders of Hugging Face, or plain safetensors."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import src
from src import checkpoints
from src.checkpoints import ENCODERS, FORMAT, THETA0, as_safetensors, disk_errors, write_text
from src.errors import UsageError
from src.merging.pool import CLIPVisionModelPool
from src.merging.registry import PRETRAINED
from src.merging.stream import Merge, Part
from src.merging.writer import new_folder, size_of, write_file, write_shards

RECIPE = "merge_recipe.json"
COPIED = (".json", ".txt", ".model")  # configuration and tokenizer of a folder
SHARD = "5GB"


def recipe(merge: Merge) -> dict[str, Any]:
    """What it takes to merge again: method, options, and which models they were."""
    models = [*([PRETRAINED] if merge.theta0 else []), *merge.pool.model_names]
    return {
        "method": merge.method.name,
        "source": merge.method.source,
        "options": merge.options,
        "models": {name: merge.pool.weights(name).identity() for name in models},
        "version": src.__version__,
    }


def save_merged(
    merge: Merge, path: str | Path, max_shard_size: str | int = SHARD, fsync: bool = True
) -> Path:
    """Merges into a file or folder, without holding the result in memory.

    Encoders of ours give a checkpoint of ours, `.safetensors`; anything else a file if the name
    ends in `.safetensors`, otherwise a folder of Hugging Face with the base model's configuration.
    Either is there as a whole or not at all; the recipe is kept in it.

    Args:
        merge: what to merge.
        path: where to.
        max_shard_size: size of a file of a folder, such as "5GB".
        fsync: whether to wait until the disk has it.

    Returns:
        The file or folder that was written.

    Raises:
        UsageError: if the path is taken by something else, or the disk is full.
    """
    path, limit = Path(path).expanduser(), size_of(max_shard_size)
    encoder = merge.thetas[-1].kind in ENCODERS
    single = encoder or path.suffix in (".safetensors", ".pt", ".pth", ".bin")
    if single:
        path = as_safetensors(path.with_suffix("") if path.suffix == ".bin" else path)
        _check_free(merge, path)
    with disk_errors(path):
        if encoder:
            _write_encoder(merge, path, merge.thetas[-1].kind, fsync)
        elif single:
            write_file(path, merge.pool.base.outline, merge.parts(), _metadata(merge), fsync=fsync)
        else:
            _write_folder(merge, path, limit, fsync)
    return path


def _check_free(merge: Merge, path: Path) -> None:
    """Refuses to write over one of the models that are merged, which are being read."""
    for name in merge.pool.models:
        place = Path(merge.pool.weights(name).place or "").expanduser()
        if path.is_file() and place.is_file() and path.samefile(place):
            raise UsageError(f"{path} is the model {name} itself; name another file")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a file or a name that is free")


def _metadata(merge: Merge) -> dict[str, str]:
    return {"format": "pt", "merge_recipe": json.dumps(recipe(merge), sort_keys=True)}


def _write_encoder(merge: Merge, path: Path, kind: str, fsync: bool) -> None:
    """A checkpoint of ours; a linear one holds the point of expansion too."""
    outline, parts = dict(merge.pool.base.outline), merge.parts()
    base = merge.theta0
    info = {"model": merge.pool.base.facts.get("model"), "merge_recipe": recipe(merge)}
    if kind == "linearized_image_encoder":
        if base is None:
            raise UsageError(f"linear models need the pre-trained one, named {PRETRAINED}")
        outline |= {THETA0 + name: value for name, value in base.outline.items()}
        parts = chain(parts, _copied(base))
    facts = {
        "format": FORMAT,
        "kind": kind,
        "theta0_hash": str(base.facts.get("hash") or "") if base else "",
        "info": json.dumps(info, sort_keys=True),
    }
    write_file(path, outline, parts, facts, hashed=True, fsync=fsync)


def _copied(base: Any) -> Iterator[Part]:
    for name in sorted(base.outline):
        yield Part(THETA0 + name, 0, base.read(name).reshape(-1))


def _write_folder(merge: Merge, path: Path, limit: int, fsync: bool) -> None:
    base, metadata = merge.pool.base, _metadata(merge)
    with new_folder(path, RECIPE) as folder:
        if base.folder is not None:
            _copy_configuration(base.folder, folder, isinstance(merge.pool, CLIPVisionModelPool))
        write_shards(folder, base.outline, merge.parts(), metadata, limit, fsync)
        write_text(folder / RECIPE, json.dumps(recipe(merge), indent=2) + "\n")


def _copy_configuration(source: Path, target: Path, vision: bool) -> None:
    """Copies what a folder has beside its weights; of a whole CLIP the vision tower's part."""
    for file in sorted(source.iterdir()):
        listed = file.name.endswith(".index.json") or file.name == RECIPE
        if file.is_file() and file.suffix in COPIED and not listed:
            shutil.copyfile(file, target / file.name)
    config = target / "config.json"
    if not vision or not config.is_file():
        return
    found = json.loads(config.read_text(encoding="utf-8"))
    if found.get("model_type") == "clip":
        inner = {**(found.get("vision_config") or {})}
        inner.setdefault("projection_dim", found.get("projection_dim", 512))
        found = {**inner, "model_type": "clip_vision_model"}
    found["architectures"] = ["CLIPVisionModel"]
    write_text(config, json.dumps(found, indent=2, sort_keys=True) + "\n")


def written_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe that a merged file or folder carries.

    Raises:
        UsageError: if it carries none.
    """
    from safetensors import safe_open

    path = Path(path)
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    found: Any = None
    if files and (own := checkpoints.read_header(files[0])) is not None:
        found = own["info"].get("merge_recipe")
    elif files:
        with contextlib.suppress(ValueError, RecursionError), safe_open(files[0], "pt") as opened:
            found = json.loads((opened.metadata() or {}).get("merge_recipe", "null"))
    if not isinstance(found, dict):
        raise UsageError(f"{path} was not written by a merge")
    return found
