"""This project's checkpoints: safetensors files with JSON metadata, verified when read.

Standard and linear checkpoints use the same parameter names (`model.visual...`); the mode is
metadata. A linear checkpoint holds theta, and theta0 (as `theta0/...`) unless a zero-shot file with
the same content lies in its folder or one folder up.

Files of other projects are read by `tangent_arithmetic.encoders.loading`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tangent_arithmetic.runtime.atomic import atomic
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.storage.reading import check_header
from tangent_arithmetic.storage.statedict import TIES, State, check_stored, content_hash, ties

PROJECT = "tangent-arithmetic/"
FORMAT = f"{PROJECT}1"
THETA0 = "theta0/"
ZEROSHOT = "zeroshot.safetensors"
STATE = "run_state"  # see storage/states.py
ENCODERS = ("image_encoder", "linearized_image_encoder")
CLASSIFIER = "image_classifier"  # of encoders/classifiers.py
BACKBONE = "mlp_backbone"  # of encoders/mlp.py
FOLDERS = ("config.json", "adapter_config.json")  # one of these is in a Hugging Face folder


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        theta: the weights, by name.
        kind: type of the model, for instance "image_encoder", "linearized_image_encoder" or "head".
        hash: content hash of theta.
        theta0: expansion point of a linear checkpoint.
        theta0_hash: content hash of the pre-trained weights.
        info: further metadata, for instance the model's name and the training settings.
    """

    theta: dict[str, Tensor]
    kind: str
    hash: str
    theta0: dict[str, Tensor] | None = None
    theta0_hash: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


def as_safetensors(path: str | Path) -> Path:
    """The path to write for a path given by the user: `.pt` becomes `.safetensors`."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        return path.with_suffix(".safetensors")
    return path.with_name(path.name + ".safetensors")


def candidates(path: str | Path) -> list[Path]:
    """Possible locations of a checkpoint named in our convention or that of the public projects.

    `.pt` also means `.safetensors`, folder X means XVal and vice versa, `linear_zeroshot` means
    `zeroshot`, and a task's zero-shot file is that of the run, one folder up.
    """
    ours = as_safetensors(Path(path).absolute())
    name = ours.name.removeprefix("linear_") if "zeroshot" in ours.name else ours.name
    folder = ours.parent
    twin = folder.name.removesuffix("Val") if folder.name.endswith("Val") else f"{folder.name}Val"
    paths = [ours, folder / name]
    if folder.name:
        paths.append(folder.with_name(twin) / name)
    if name == ZEROSHOT:
        paths.append(folder.parent / name)
    if name.startswith("head_"):
        plain = name.removesuffix(".safetensors").removesuffix("Val")
        paths += [folder / f"{plain}.safetensors", folder / f"{plain}Val.safetensors"]
    return list(dict.fromkeys(paths))


def save_tensors(
    path: str | Path,
    theta: dict[str, Tensor],
    kind: str,
    theta0: dict[str, Tensor] | None = None,
    theta0_hash: str | None = None,
    info: dict[str, Any] | None = None,
) -> str:
    """Writes a checkpoint and returns the content hash of theta.

    Args:
        path: file to write; `.pt` becomes `.safetensors`.
        theta: the weights.
        kind: type of the model.
        theta0: expansion point; stored unless a zero-shot file holds the same weights.
        theta0_hash: content hash of the pre-trained weights; computed from theta0 if given.
        info: JSON-serialisable metadata.

    Raises:
        UsageError: if a weight is not finite (allowed in a `run_state` only), or not a dense tensor
            with numbers.
        UnwritableError: if the file cannot be written.
    """
    path = as_safetensors(path)
    check_stored(theta, f"{path} was not written: a checkpoint")
    if kind != STATE and (bad := not_finite(theta)):
        names = ", ".join([*map(shown, bad[:3]), *(["..."] if len(bad) > 3 else [])])
        raise UsageError(
            f"{path} was not written: {len(bad)} of {len(theta)} tensors are not finite ({names}); "
            "expected finite weights"
        )
    if kind in (*ENCODERS, BACKBONE) and (tied := ties(theta)):
        info = {**(info or {}), TIES: tied}
    tensors = dict(theta)
    if theta0 is not None:
        theta0_hash = content_hash(theta0)
        if _find_zeroshot(path, theta0_hash) is None:
            tensors |= {THETA0 + name: value for name, value in theta0.items()}
    tensors = _storable(tensors)
    facts = {
        "format": FORMAT,
        "kind": kind,
        "hash": content_hash({name: tensors[name] for name in theta}),
        "theta0_hash": theta0_hash or "",
        "info": json.dumps(without_home(info or {}), sort_keys=True),
    }
    facts["check"] = checksum(facts)
    with atomic(path) as temporary:
        save_file(tensors, str(temporary), metadata=facts)
    return facts["hash"]


def not_finite(state: State) -> list[str]:
    """The names of the tensors that hold NaN or infinity; attention masks may hold infinity."""
    names = []
    for name, value in state.items():
        if value.is_floating_point() or value.is_complex():
            wide = value.float() if value.element_size() == 1 else value  # float8 has no `isnan`
            bad = wide.isnan() if name.endswith("mask") else ~wide.isfinite()
            if bool(bad.any()):
                names.append(name)
    return names


def checksum(facts: Mapping[str, str]) -> str:
    """Checksum of a file's metadata; `hash` covers its tensors."""
    covered = {name: facts[name] for name in sorted(facts) if name != "check"}
    return hashlib.sha256(json.dumps(covered).encode()).hexdigest()


def _storable(state: State) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous and without shared storages, copied only if necessary."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        dense = value.detach().cpu().resolve_neg().resolve_conj().contiguous()
        storage = dense.untyped_storage().data_ptr()
        tensors[name] = dense.clone() if storage in storages else dense
        storages.add(storage)
    return tensors


def read_header(path: Path) -> dict[str, Any] | None:
    """The metadata of one of our files, see `read_facts`; None for a file of another project.

    Raises:
        UsageError: if the file is damaged, or from another version of this project.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        check_header(path)
        with safe_open(str(path), framework="pt") as file:
            facts: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    file_format = facts.get("format", "")
    if file_format.startswith(PROJECT) and file_format != FORMAT:
        raise UsageError(
            f"{path} has format {file_format!r}, expected {FORMAT!r}: it was written by another "
            "version of this project"
        )
    if file_format != FORMAT:
        return None
    if facts.get("check", checksum(facts)) != checksum(facts):
        raise damaged(path, "its header's checksum differs")
    try:
        info = json.loads(facts["info"])
        if not isinstance(info, dict):
            raise TypeError(f"info is a {type(info).__name__}")
        return {name: facts[name] for name in ("format", "kind", "hash", "theta0_hash")} | {
            "info": info
        }
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def damaged(path: Path, reason: object) -> UsageError:
    """The error for a file whose content is not what was written."""
    return UsageError(f"{path} is damaged ({reason}); delete it and create it again")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file of any origin.

    Raises:
        UsageError: if the file is damaged.
    """
    try:
        check_header(path)
        return load_file(path)
    except (SafetensorError, OSError, MemoryError) as error:
        raise damaged(path, error) from error


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Reads and verifies one of our files; returns None for a file of another project.

    Raises:
        MissingFileError: if it needs a zero-shot file that does not exist.
        UsageError: if it is damaged.
    """
    facts = read_header(path)
    if facts is None:
        return None
    tensors = read_safetensors(path)
    theta = {name: value for name, value in tensors.items() if not name.startswith(THETA0)}
    if content_hash(theta) != facts["hash"]:
        raise damaged(path, "its checksum differs")
    theta0 = {n.removeprefix(THETA0): v for n, v in tensors.items() if n.startswith(THETA0)}
    theta0_hash = facts["theta0_hash"] or None
    if theta0 and content_hash(theta0) != theta0_hash:
        raise damaged(path, "theta0's checksum differs")
    if facts["kind"].startswith("linearized_") and not theta0:
        zeroshot = _find_zeroshot(path, str(theta0_hash))
        checkpoint = None if zeroshot is None else read_checkpoint(zeroshot)
        if checkpoint is None:
            raise MissingFileError(
                f"{path} was linearised at weights {str(theta0_hash)[:12]}..., expected in "
                f"{ZEROSHOT} in its folder or one folder up, but neither has them; put that file "
                "back"
            )
        theta0 = checkpoint.theta
    return Checkpoint(
        theta, facts["kind"], facts["hash"], theta0 or None, theta0_hash, facts["info"]
    )


def _find_zeroshot(path: Path, theta0_hash: str) -> Path | None:
    """The zero-shot file near `path` (same folder or one up) with this content hash."""
    path = path.absolute()
    for folder in (path.parent, path.parent.parent):
        zeroshot = folder / ZEROSHOT
        if zeroshot.is_file() and zeroshot != path:
            with contextlib.suppress(UsageError):
                facts = read_header(zeroshot)
                if facts is not None and facts["hash"] == theta0_hash:
                    return zeroshot
    return None
