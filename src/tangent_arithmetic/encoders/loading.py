"""Checkpoints of this project and of others, in one representation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tangent_arithmetic.encoders.published import hub
from tangent_arithmetic.encoders.published.layout import beside
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


def resolve(path: str | Path, made_by: str | None = None) -> Path:
    """The existing file or folder that a path stands for.

    If `path` names a file of another format and one of ours with the same stem lies beside it, ours
    is used, with a warning: `save` has written it in place of the other.

    Args:
        path: a path in our naming scheme or that of the public projects, see `candidates`, or a
            name on the Hugging Face hub, `hf-hub:ORG/NAME`.
        made_by: the command that makes the file, for the error.

    Raises:
        MissingFileError: if there is no such file.
    """
    if hub.is_hub(path):
        return hub.fetch(path)
    named, tried = Path(path).absolute(), candidates(path)
    if named.is_file() or any((named / name).is_file() for name in FOLDERS):
        return _ours_beside(named) or named
    published = [
        ours.with_name(name).with_suffix(".pt")
        for ours in tried
        for name in (ours.name, f"nonlinear_{ours.name}")
    ]
    named_by_folder = (file for ours in tried for file in beside(ours))
    for candidate in (*tried, *published, *named_by_folder):
        if candidate.is_file() or (candidate / "config.json").is_file():
            return candidate
    way_out = f" Make it with: {made_by}" if made_by else ""
    raise MissingFileError(
        f"no checkpoint at {path} (looked for {', '.join(map(str, tried))}).{way_out}"
    )


def _ours_beside(named: Path) -> Path | None:
    """The file that `save` writes for the name `named`, if it exists and differs from it."""
    ours = as_safetensors(named)
    if ours == named or not ours.is_file():
        return None
    try:
        if read_header(ours) is None:
            return None
    except UsageError as error:
        logger.warning("%s; reading %s beside it instead", error, named)
        return None
    logger.warning("reading %s, written by this project, instead of %s", ours, named.name)
    return ours


def read_facts(path: Path, model: str | None = None) -> dict[str, Any]:
    """A checkpoint's metadata: kind, hash, theta0_hash, info; reads only the header of our files.

    Raises:
        UsageError: if the file is damaged or of an unknown kind.
    """
    facts = read_header(path)
    if facts is not None:
        return facts
    checkpoint = load(path, model)
    facts = {name: getattr(checkpoint, name) for name in ("kind", "hash", "info")}
    return {**facts, "theta0_hash": checkpoint.theta0_hash or ""}


def load_checkpoint(
    path: str | Path,
    made_by: str | None = None,
    kinds: Sequence[str] | None = None,
    model: str | None = None,
) -> Checkpoint:
    """Reads and checks a checkpoint.

    Args:
        path: see `resolve`.
        made_by: the command that makes the file, for the error.
        kinds: the kinds to accept; None for all.
        model: the model's name; overrides the one in a published file.

    Raises:
        MissingFileError: if the file, or a zero-shot file that it depends on, does not exist.
        UsageError: if it is damaged or of another kind.
    """
    path = resolve(path, made_by)
    kind = read_facts(path, model)["kind"]
    if kinds is not None and kind not in kinds:
        wanted = "an encoder" if set(kinds) >= set(ENCODERS) else f"a {' or '.join(kinds)}"
        raise UsageError(f"{path} holds a {kind}, expected {wanted}")
    return read_checkpoint(path) or load(path, model)
