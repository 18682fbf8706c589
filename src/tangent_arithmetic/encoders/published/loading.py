"""Reads published files as our `Checkpoint`s, theta0 included."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tangent_arithmetic.encoders.published.formats import read
from tangent_arithmetic.encoders.published.layout import ZEROSHOTS, facts_of
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import ZEROSHOT, Checkpoint, read_checkpoint
from tangent_arithmetic.storage.reading import readable
from tangent_arithmetic.storage.statedict import content_hash

logger = logging.getLogger(__name__)

KEPT = 2  # files in the cache: metadata and weights are read in separate calls
_recent: OrderedDict[tuple[Any, ...], Checkpoint] = OrderedDict()


def load(path: Path, model: str | None = None, theta0: Path | None = None) -> Checkpoint:
    """Reads a published file or folder; nothing in it is executed.

    Args:
        path: a file of `pickle`, `torch.save` or safetensors, or a Hugging Face folder.
        model: the model's name, if the file does not state it.
        theta0: file of the pre-trained weights; None for the published zero-shot file in the same
            folder or its parent, if any.

    Raises:
        UsageError: if the format is unknown; describes the content.
    """
    path = path.absolute()
    with readable(path, "a published checkpoint"):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stamps = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = (path, stamps, model, theta0)
    if key not in _recent:
        _recent[key] = _load(path, model, theta0 or _near(path, ZEROSHOTS))
        while len(_recent) > KEPT:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    return _recent[key]


def _load(path: Path, model: str | None, start: Path | None) -> Checkpoint:
    def base() -> Mapping[str, Tensor]:
        near = start or _near(path, (ZEROSHOT,))
        if near is None:
            raise UsageError(
                f"{path} is a CLIPVisionModel, which lacks the base model's projection. Put the "
                "base model's zeroshot file beside it, or name it: tangent-arithmetic checkpoint "
                f"convert {path} OUT --theta0=FILE"
            )
        return _starting_point(near)

    checkpoint = read(path, model, base)
    logger.info("%s: %s", path, checkpoint.info["published"])
    if facts := facts_of(path):
        checkpoint = replace(checkpoint, info={**checkpoint.info, "trained": facts})
    if checkpoint.kind != "image_encoder" or start is None:
        return checkpoint
    return replace(checkpoint, theta0_hash=content_hash(_starting_point(start)))


def _starting_point(path: Path) -> dict[str, Tensor]:
    """theta0: the weights of a zero-shot file, or the point of expansion of a linear one."""
    checkpoint = read_checkpoint(path) or load(path)
    return checkpoint.theta0 or checkpoint.theta


def _near(path: Path, names: Sequence[str]) -> Path | None:
    """The zero-shot file in the folder of a published file, or in its parent."""
    if path.stem.endswith("zeroshot") or path.stem.startswith("head_"):
        return None
    for folder in (path.parent, path.parent.parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None
