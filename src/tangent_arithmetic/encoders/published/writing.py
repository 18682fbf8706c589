"""Writes checkpoints as the public projects read them.

A standard encoder becomes the state dict of their `ImageEncoder`, a linear one that of their
`LinearizedImageEncoder` (tensors by index, and the model's name), a head a pickled
`ClassificationHead` of `src.modeling`. Their encoder holds the CLIP without its text transformer;
its further weights, which no fine-tuning changes, come from a file of theirs or from the model.

Source: the formats of gortizji/tangent_task_arithmetic, mlfoundations/task_vectors and
nik-dim/tall_masks.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tangent_arithmetic.encoders.clip import VISUAL, create_clip, outlined, shapes
from tangent_arithmetic.encoders.published.formats import in_float32, orders
from tangent_arithmetic.runtime.atomic import atomic
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.checkpoints import ENCODERS, Checkpoint
from tangent_arithmetic.storage.wrappers import read_weights

PREFIX = "model."
TEXT = "model.transformer."  # what their encoder lacks
WRITABLE = (*ENCODERS, "head")


def write(checkpoint: Checkpoint, target: Path, theta0: Path | None = None) -> str:
    """Writes a checkpoint for the public projects.

    Args:
        checkpoint: an encoder, standard or linear, or a head.
        target: the file to write, `*.pt`.
        theta0: a file of the public projects, or of a whole CLIP, that holds the weights beside the
            vision tower; None for the model's own.

    Returns:
        A description of the format.

    Raises:
        UsageError: if the public projects have no format for it.
    """
    if target.suffix not in (".pt", ".pth"):
        raise UsageError(f"expected OUT to end in .pt, as the public projects expect; got {target}")
    if checkpoint.kind not in WRITABLE:
        raise UsageError(
            f"the public projects have no format for a {shown(checkpoint.kind)}; expected one of "
            f"{', '.join(WRITABLE)}"
        )
    if checkpoint.kind == "head":
        _save_head(checkpoint, target)
        return "pickled src.modeling.ClassificationHead"
    model = checkpoint.info.get("model")
    if not isinstance(model, str):
        raise UsageError("the checkpoint does not state its model; name it with --model")
    rest = _beside(model, theta0)
    if checkpoint.kind == ENCODERS[0]:
        _save(_whole(checkpoint.theta, rest), target)
        return f"state dict of an ImageEncoder({model})"
    _save(_by_index(checkpoint, model, rest), target)
    return f"linear model by index ({model})"


def _save(content: Any, target: Path) -> None:
    with atomic(target) as temporary:
        torch.save(content, temporary)


def _beside(model: str, theta0: Path | None) -> dict[str, Tensor]:
    """The weights of their encoder beside the vision tower, by name, in the model's order."""
    names = [f"{PREFIX}{name}" for name in outlined(model).state_dict()]
    wanted = [n for n in names if not n.startswith((TEXT, VISUAL))]
    source = f"the weights of {model}"
    if theta0 is None:
        state = {f"{PREFIX}{n}": v for n, v in create_clip(model)[0].state_dict().items()}
    else:
        source, state = str(theta0), _named(theta0, model)
    if missing := [name for name in wanted if name not in state]:
        raise UsageError(
            f"{source} lacks {len(missing)} of the weights that an encoder of the public projects "
            f"has beside its vision tower ({', '.join(map(shown, missing[:3]))}); name their "
            "zeroshot.pt with --theta0"
        )
    return {name: in_float32(state[name]) for name in wanted}


def _named(path: Path, model: str) -> dict[str, Tensor]:
    """The weights in a file of theirs, by name: of an encoder, or of a linear one by index."""
    state = read_weights(path)
    if f"{PREFIX}params0.0" in state:
        order = next((o for o in orders(model) if f"{PREFIX}params0.{len(o) - 1}" in state), {})
        return {name: state[f"{PREFIX}params0.{i}"] for i, name in enumerate(order)}
    return {n if n.startswith(PREFIX) else f"{PREFIX}{n}": value for n, value in state.items()}


def _whole(theta: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((name, value.contiguous()) for name, value in {**rest, **theta}.items())


def _by_index(checkpoint: Checkpoint, model: str, rest: Mapping[str, Tensor]) -> dict[str, Any]:
    """Their linear format: parameters numbered in the order of their encoder, without buffers."""
    outline, tower = outlined(model), shapes(model)
    order = [f"{PREFIX}{name}" for name, _ in outline.named_parameters()]
    order = [name for name in order if not name.startswith(TEXT)]
    if buffers := sorted(set(tower) - set(order)):
        raise UsageError(
            f"the public projects' linear format stores no buffers, which {model} has "
            f"({', '.join(buffers[:3])}); a standard checkpoint can be written"
        )
    theta0 = checkpoint.theta0
    assert theta0 is not None
    content: dict[str, Any] = {}
    for part, theta in (("params", checkpoint.theta), ("params0", theta0)):
        whole = {**rest, **theta}
        content |= {f"{PREFIX}{part}.{i}": whole[name] for i, name in enumerate(order)}
    return {**content, "model_name": model}


def _save_head(checkpoint: Checkpoint, target: Path) -> None:
    """Pickles a head under the name that their code imports."""
    classes, features = checkpoint.theta["weight"].shape

    def init(self: nn.Linear) -> None:
        nn.Linear.__init__(self, features, classes)

    kind = type(
        "ClassificationHead", (nn.Linear,), {"__init__": init, "__module__": "src.modeling"}
    )
    head = kind()
    head.load_state_dict(checkpoint.theta)
    head.normalize = checkpoint.info["normalize"]
    package, module = ModuleType("src"), ModuleType("src.modeling")
    module.ClassificationHead = kind  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {"src": package, "src.modeling": module}):
        _save(head, target)
