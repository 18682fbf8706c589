"""Merging into files: our checkpoints, Hugging Face folders, or plain safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tangent_arithmetic import __version__
from tangent_arithmetic.encoders.base import BUILT
from tangent_arithmetic.merging.cards import CARD, card
from tangent_arithmetic.merging.plugins import written_plugins
from tangent_arithmetic.merging.pool import CLIPVisionModelPool
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.merging.stream import Merge, Part
from tangent_arithmetic.merging.weights import CONFIG, SUFFIXES, Weights
from tangent_arithmetic.merging.writer import (
    INDEX,
    files_beside,
    new_files,
    plan_shards,
    write_file,
    write_shards,
)
from tangent_arithmetic.runtime.atomic import (
    PART,
    check_writable,
    disk_errors,
    write_json,
    write_text,
)
from tangent_arithmetic.runtime.digests import file_hash
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.private import expanded, without_home
from tangent_arithmetic.storage import checkpoints
from tangent_arithmetic.storage.checkpoints import FORMAT, THETA0, as_safetensors
from tangent_arithmetic.storage.reading import read_json, read_text, readable
from tangent_arithmetic.storage.statedict import TIES

logger = logging.getLogger(__name__)
RECIPE = "merge_recipe.json"
# configuration, tokenizer and preprocessor of a folder
COPIED = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".bpe")
CODE = ".py"  # copied where one of `CONFIGS` names classes in `auto_map`
CONFIGS = (CONFIG, "tokenizer_config.json")
MODULES = "modules.json"  # of sentence-transformers, which lists folders
# of the same kinds, but of the base model's own making
LEFT = (RECIPE, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
SHARD = "5GB"


def recipe(merge: Merge) -> dict[str, Any]:
    """The recipe of a merge, as stored with the result: method, options, identity of the models."""
    models = [*([PRETRAINED] if merge.theta0 else []), *merge.pool.model_names]
    content = {
        "method": merge.method.name,
        "source": merge.method.source,
        "options": merge.options,
        **({"plugins": written_plugins(merge.plugins)} if merge.plugins else {}),
        "models": {name: merge.pool.weights(name).identity() for name in models},
        "version": __version__,
    }
    return dict(without_home(content))


def save_merged(
    merge: Merge, path: str | Path, max_shard_size: str | int = SHARD, fsync: bool = True
) -> Path:
    """Merges into a file or folder, without holding the result in memory.

    Our encoders give a checkpoint of ours, `.safetensors`; other models a file if the name ends in
    `.safetensors`, else a Hugging Face folder with the base model's configuration. The result is
    written atomically, with its recipe. It replaces only files of an earlier merge.

    Args:
        merge: the merge.
        path: the file or folder to write.
        max_shard_size: the largest size of a file in a folder, such as "5GB"; "base" for the
            files of the base model.
        fsync: wait until the result is on the disk.

    Returns:
        The file or folder that was written.

    Raises:
        UsageError: if the path belongs to one of the models or to other content, or cannot be
            written.
    """
    path = check_target(merge, path, max_shard_size)
    with disk_errors(path):
        if merge.thetas[-1].is_encoder:
            _write_encoder(merge, path, fsync)
        elif _is_file(path):
            metadata = _metadata(recipe(merge))
            write_file(path, merge.pool.base.outline, merge.parts(), metadata, fsync=fsync)
        else:
            _write_folder(merge, path, plan_shards(merge.pool.base, max_shard_size), fsync)
    return path


def check_target(merge: Merge, path: str | Path, max_shard_size: str | int = SHARD) -> Path:
    """Checks, before the work, that the result can be written without losing other files.

    Args:
        merge: the merge.
        path: the file or folder to write.
        max_shard_size: the largest size of a file in a folder.

    Returns:
        The path that will be written, with its suffix.

    Raises:
        UsageError: if it cannot be written.
    """
    path, shards = expanded(path), plan_shards(merge.pool.base, max_shard_size)
    with readable(path, "a path for the merged model"), disk_errors(path):
        if merge.thetas[-1].is_encoder or _is_file(path):
            named, path = path, file_of(path)
            _refuse_inputs(merge, path, [named, path])
            _check_file(path)
            check_writable(path)
        else:
            names = _file_names(merge, shards)
            _refuse_inputs(merge, path, [path, *(path / name for name in names)])
            _replaced(path, names)
            with files_beside(path):
                pass
    return path


def file_of(place: str | Path) -> Path:
    """The file that is written for a path, if it is not a folder: `.safetensors` for any ending."""
    path = expanded(place)
    return as_safetensors(path.with_suffix("") if path.suffix == ".bin" else path)


def _is_file(path: Path) -> bool:
    return path.suffix in SUFFIXES


def _refuse_inputs(merge: Merge, path: Path, outputs: Sequence[Path]) -> None:
    """Refuses to overwrite a merged model, to write into its folder, or to take precedence over it.

    `.safetensors` is read instead of `.pt`.
    """
    target, existing = path.resolve(), [each for each in outputs if each.exists()]
    for name in merge.pool.models:
        weights = merge.pool.weights(name)
        same = any(each.samefile(file) for each in existing for file in weights.files)
        if same or target in [as_safetensors(file).resolve() for file in weights.files]:
            raise UsageError(f"{path} is the model {name} itself; choose another path")
        folder = weights.folder.resolve() if weights.folder else None
        if folder in (target, *target.parents):
            raise UsageError(f"{path} is in the folder of the model {name}; choose another path")
        if target in [file.resolve().parent for file in weights.files]:
            raise UsageError(f"{path} holds the model {name}; choose another folder")


def _check_file(path: Path) -> None:
    """Refuses an existing path that no merge has written."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; expected a file or a new path")
    if path.exists() and not _has_recipe(path):
        raise UsageError(
            f"{path} exists and is not the result of a merge, so it is not replaced; choose "
            "another file, or remove it"
        )


def _file_names(merge: Merge, shards: Mapping[str, Sequence[str]]) -> list[str]:
    """The names of all files in the folder of the merged model."""
    base = merge.pool.base
    copied = [*(path.name for path in _configuration(base.folder)), *base.written]
    return [*shards, *([INDEX] if len(shards) > 1 else []), *copied, CARD, RECIPE]


def may_write(merge: Merge, target: Path, path: Path) -> bool:
    """Whether a path is that of a file which a merged model in a folder may consist of."""
    shard = path.suffix == ".safetensors"
    inside = path.resolve().parent == target.resolve()
    return inside and (shard or path.name in {INDEX, *_file_names(merge, {})})


def _replaced(path: Path, names: Sequence[str]) -> list[str]:
    """The names in a folder that belong to an earlier merge, and are replaced; others stay.

    Args:
        path: the folder, which need not exist.
        names: the files to write into it.

    Raises:
        UsageError: if no earlier merge wrote the folder, or one of `names` would be replaced.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; expected a folder or a new path")
    entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    present = [name for name in entries if not name.endswith(PART)]  # a merge writes there
    own = _own_files(path) if present else set()
    if present and not own:
        raise UsageError(
            f"{path} holds other files; expected a new folder, an empty one, or the result of an "
            "earlier merge. Choose another folder"
        )
    if taken := [name for name in present if name in names and name not in own]:
        raise UsageError(
            f"{path} holds {', '.join(map(shown, taken))}, which an earlier merge did not write or "
            "which has changed since; move it away, or choose another folder"
        )
    return [name for name in present if name in own]


def _own_files(folder: Path) -> set[str]:
    """The files in a folder that are unchanged since an earlier merge wrote them."""
    try:
        content = read_json(folder / RECIPE)
    except UsageError:
        return set()
    if not {"method", "models"} <= content.keys():
        return set()
    listed = content.get("files")
    if not isinstance(listed, dict):  # of an earlier version, without a list
        listed = {file.name: None for file in folder.glob("model*.safetensors")}
        listed[INDEX] = _digest(folder / INDEX)
    return {RECIPE, *(name for name in listed if _is_own(folder / name, listed[name]))}


def _is_own(path: Path, digest: Any) -> bool:
    if path.is_symlink() or not path.exists():
        return False
    if digest is not None:
        return bool(_digest(path) == digest)
    return path.is_file() and _has_recipe(path)


def _digest(path: Path) -> str | None:
    """The hash of a file or folder; None for weights, whose header holds the recipe."""
    if path.is_dir():
        inner = sorted(each for each in path.rglob("*") if not each.is_dir())
        listed = [f"{each.relative_to(path)} {file_hash(each)}" for each in inner]
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()
    return file_hash(path) if path.suffix != ".safetensors" and path.is_file() else None


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "merge_recipe": json.dumps(facts, sort_keys=True)}


def _write_encoder(merge: Merge, path: Path, fsync: bool) -> None:
    """Writes one of our checkpoints; a linear one also holds the expansion point."""
    outline, parts = dict(merge.pool.base.outline), merge.parts()
    model, base = merge.thetas[-1], merge.theta0
    known = merge.pool.base.facts if merge.pool.base.is_encoder else model.facts
    kept = {key: known[key] for key in ("model", BUILT) if key in known}
    ties = {TIES: merge.ties} if merge.ties else {}
    info = {**kept, **ties, "merge_recipe": recipe(merge)}
    if model.is_linear:
        if base is None:
            raise UsageError(f"linear models need the pre-trained model, named {PRETRAINED}")
        outline |= {THETA0 + name: value for name, value in base.outline.items()}
        copied = (Part(THETA0 + n, 0, base.read(n).reshape(-1)) for n in sorted(base.outline))
        parts = chain(parts, copied)
    facts = {
        "format": FORMAT,
        "kind": model.kind,
        "theta0_hash": str(base.facts.get("hash") or "") if base else "",
        "info": json.dumps(info, sort_keys=True),
    }
    write_file(path, outline, parts, facts, hashed=True, fsync=fsync)


def _write_folder(
    merge: Merge, path: Path, shards: Mapping[str, Sequence[str]], fsync: bool
) -> None:
    base, facts, names = merge.pool.base, recipe(merge), _file_names(merge, shards)
    with new_files(path, lambda: _replaced(path, names)) as folder:
        _copy_configuration(base, folder)
        _adapt_config(folder / CONFIG, isinstance(merge.pool, CLIPVisionModelPool))
        write_shards(folder, shards, base.outline, merge.parts(), _metadata(facts), fsync)
        write_text(folder / CARD, card(merge, facts, path.resolve().name))
        files = {file.name: _digest(file) for file in sorted(folder.iterdir())}
        write_json(folder / RECIPE, {**facts, "files": files})


def _configuration(folder: Path | None) -> list[Path]:
    """The files of a Hugging Face folder beside its weights: configuration, tokenizer and code.

    Of sentence-transformers also the folders of its further modules.
    """
    if folder is None:
        return []
    listed = _read(folder / MODULES, list) or []
    modules = [each.get("path") for each in listed if isinstance(each, dict)]
    with_code = any("auto_map" in (_read(folder / name, dict) or {}) for name in CONFIGS)
    suffixes = (*COPIED, CODE) if with_code else COPIED
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.suffix in suffixes if path.is_file() else path.name in modules)
        if not path.name.endswith(".index.json") and path.name not in LEFT
    ]


def _read(path: Path, kind: type) -> Any:
    """The content of a JSON file; None if it cannot be read, or is not of this kind."""
    with contextlib.suppress(UsageError, ValueError, RecursionError):
        content = json.loads(read_text(path))
        return content if isinstance(content, kind) else None
    return None


def _copy_configuration(base: Weights, target: Path) -> None:
    """Copies the files beside the base model's weights, or writes those that the merge changes."""
    for source in _configuration(base.folder):
        if source.is_dir():
            shutil.copytree(source, target / source.name)
            if any(file.suffix in SUFFIXES for file in source.rglob("*")):
                logger.warning("weights in %s are copied from the base model, not merged", source)
        else:
            shutil.copyfile(source, target / source.name)
    for name, text in base.written.items():
        write_text(target / name, text)


def _adapt_config(path: Path, vision: bool) -> None:
    """Removes home folders from the paths in a `config.json`; of a CLIP, the vision part stays."""
    if (content := _read(path, dict)) is None:
        return
    adapted = _shared(content)
    if vision and content.get("model_type") == "clip":
        own = adapted.get("vision_config")
        inner = own if isinstance(own, dict) else {}
        projection = {"projection_dim": content.get("projection_dim", 512)}
        adapted = {**projection, **inner, "model_type": "clip_vision_model"}
    if vision:
        adapted["architectures"] = ["CLIPVisionModel"]
    if adapted != content:
        write_text(path, json.dumps(adapted, indent=2) + "\n")


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose paths, such as `_name_or_path`, have no home folder."""

    def shared(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _shared(value)
        return without_home(value) if "path" in key else value

    return {key: shared(key, value) for key, value in config.items()}


def written_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe in a merged file or folder.

    Raises:
        UsageError: if there is none.
    """
    path = expanded(path)
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    content: Any = None
    if files and (own := checkpoints.read_header(files[0])) is not None:
        content = own["info"].get("merge_recipe")
    elif files:
        damaged = (ValueError, RecursionError, OSError, SafetensorError)
        with contextlib.suppress(*damaged), safe_open(files[0], "pt") as opened:
            content = json.loads((opened.metadata() or {}).get("merge_recipe", "null"))
    if not isinstance(content, dict):
        raise UsageError(f"{path} was not written by a merge")
    return content


def _has_recipe(path: Path) -> bool:
    with contextlib.suppress(UsageError):
        return bool(written_recipe(path))
    return False
