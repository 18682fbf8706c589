"""Checkpoints of this project and of others, found by name and read as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tangent_arithmetic.encoders.published import hub
from tangent_arithmetic.encoders.published.loading import load
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import (
    ENCODERS,
    FOLDERS,
    Checkpoint,
    as_safetensors,
    candidates,
    read_checkpoint,
    read_header,
)

logger = logging.getLogger(__name__)


def published_candidates(path: str | Path) -> list[Path]:
    """Where a checkpoint of another project may lie that is named in one of these ways."""
    found = [Path(path).absolute()]
    for ours in candidates(path):
        for name in (ours.name, f"nonlinear_{ours.name}"):
            found.append(ours.with_name(name).with_suffix(".pt"))
    return list(dict.fromkeys(found))


def resolve(path: str | Path, made_by: str | None = None) -> Path:
    """The existing file that `path` means: the one that it names, if it is there.

    Beside a file of another format that is named, ours of that name is meant, since `save` writes
    it in its place; a warning says so.

    Args:
        path: a path in our way or that of the public projects, or `hf-hub:ORG/NAME`.
        made_by: the command that makes the file, for the message.

    Raises:
        MissingFileError: if there is none.
    """
    if hub.is_hub(path):
        return hub.fetch(path)
    named, tried = Path(path).absolute(), candidates(path)
    if named.is_file() or any((named / name).is_file() for name in FOLDERS):
        return _ours_beside(named) or named
    for candidate in tried:
        if candidate.is_file():
            return candidate
    for candidate in published_candidates(path):
        if candidate.is_file() or (candidate / "config.json").is_file():
            return candidate
    way_out = f" Make it with: {made_by}" if made_by else ""
    raise MissingFileError(
        f"no checkpoint at {path} (looked for {', '.join(map(str, tried))}).{way_out}"
    )


def _ours_beside(named: Path) -> Path | None:
    """The file of ours that `save` writes where `named` is named, if there is one."""
    ours = as_safetensors(named)
    if ours == named or not ours.is_file():
        return None
    try:
        if read_header(ours) is None:
            return None
    except UsageError as error:
        logger.warning("%s; %s is read, which is beside it", error, named)
        return None
    logger.warning("%s is read, which this project wrote, not %s beside it", ours, named.name)
    return ours


def read_facts(path: Path, model: str | None = None) -> dict[str, Any]:
    """What a checkpoint is: kind, hash, theta0_hash, info. Of ours only the header is read.

    Raises:
        UsageError: if the file is damaged or of no known kind.
    """
    facts = read_header(path)
    if facts is not None:
        return facts
    found = load(path, model)
    facts = {"kind": found.kind, "hash": found.hash, "info": found.info}
    return {**facts, "theta0_hash": found.theta0_hash or ""}


def load_checkpoint(
    path: str | Path,
    made_by: str | None = None,
    kinds: Sequence[str] | None = None,
    model: str | None = None,
) -> Checkpoint:
    """Reads and checks a checkpoint.

    Args:
        path: a path in our way or that of the public projects, see `candidates`, or a name on the
            Hugging Face hub, `hf-hub:ORG/NAME`.
        made_by: the command that makes the file, for the message.
        kinds: what it may hold; None for anything.
        model: the model's name, for a published file that does not tell; the user's word counts.

    Raises:
        MissingFileError: if it is not there, or if it needs a zero-shot file that is not.
        UsageError: if it is damaged or holds something else.
    """
    path = resolve(path, made_by)
    kind = read_facts(path, model)["kind"]
    if kinds is not None and kind not in kinds:
        wanted = "an encoder" if kinds == ENCODERS else f"a {' or '.join(kinds)}"
        raise UsageError(f"{path} holds a {kind}, expected {wanted}")
    return read_checkpoint(path) or load(path, model)
