"""Published files as checkpoints of ours: their weights, what they are, where they started from."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tangent_arithmetic.encoders.published.formats import Published, read
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import ZEROSHOT, Checkpoint, read_checkpoint
from tangent_arithmetic.storage.reading import readable
from tangent_arithmetic.storage.statedict import content_hash

logger = logging.getLogger(__name__)

STARTS = ("zeroshot.pt", "nonlinear_zeroshot.pt", "linear_zeroshot.pt")
_recent: OrderedDict[tuple[Any, ...], Checkpoint] = OrderedDict()
KEPT = 2  # files whose content is kept, since facts and weights are asked for one after the other


def load(path: Path, model: str | None = None, theta0: Path | None = None) -> Checkpoint:
    """Reads a published file or folder; nothing in it is executed.

    Args:
        path: a pickle, a file of `torch.save`, safetensors, or a folder of Hugging Face.
        model: the model's name, if the file does not tell.
        theta0: the pre-trained weights it was fine-tuned from; None for the published zero-shot
            file beside it or one folder up, if there is one.

    Raises:
        UsageError: if it is not one of the known formats; the message says what was found.
    """
    path = path.absolute()
    with readable(path, "a published checkpoint"):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stamps = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = (path, stamps, model, theta0)
    if key not in _recent:
        _recent[key] = _load(path, model, theta0 or _near(path, STARTS))
        while len(_recent) > KEPT:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    return _recent[key]


def _load(path: Path, model: str | None, start: Path | None) -> Checkpoint:
    def base() -> Mapping[str, Tensor]:
        near = start or _near(path, (ZEROSHOT,))
        if near is None:
            raise UsageError(
                f"{path} is a CLIPVisionModel without a projection, which is the base model's. Put "
                "the base model's zeroshot file beside it, or convert it and name the base model: "
                f"python -m tangent_arithmetic.storage.checkpoints convert {path} OUT --theta0=FILE"
            )
        return _starting_point(near)

    found: Published = read(path, model, base)
    info = {**found.info, "published": found.format}
    theta0_hash = None
    if found.theta0 is not None:
        theta0_hash = content_hash(found.theta0)
    elif found.kind == "image_encoder" and start is not None:
        theta0_hash = content_hash(_starting_point(start))
    logger.info("%s: %s", path, found.format)
    return Checkpoint(
        found.theta, found.kind, content_hash(found.theta), found.theta0, theta0_hash, info
    )


def _starting_point(path: Path) -> dict[str, Tensor]:
    """The pre-trained weights of a zero-shot file; of a linear one, its point of expansion."""
    state = read_checkpoint(path) or load(path)
    return state.theta0 or state.theta


def _near(path: Path, names: Sequence[str]) -> Path | None:
    """The zero-shot file beside a published file, or one folder up."""
    if path.stem.endswith("zeroshot") or path.stem.startswith("head_"):
        return None
    for folder in (path.parent, path.parent.parent):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None
