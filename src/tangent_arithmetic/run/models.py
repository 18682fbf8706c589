"""The encoders, heads and splits of a run.

A fine-tuned checkpoint records the content hash of the weights that it started from; reading it is
an error if those are not the run's zero-shot weights.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.data.registry import split_record
from tangent_arithmetic.encoders.base import BUILT, Encoder, ModuleEncoder, is_encoder
from tangent_arithmetic.encoders.built import ACTIVATION
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import ImageEncoders, linearized
from tangent_arithmetic.encoders.loading import read_facts, resolve
from tangent_arithmetic.encoders.models import is_at_hand, weights_in
from tangent_arithmetic.encoders.registry import load_linear, load_standard
from tangent_arithmetic.run.heads import classification_head
from tangent_arithmetic.run.modes import get_mode
from tangent_arithmetic.run.pretrained import published_zeroshot, zeroshot_encoder
from tangent_arithmetic.run.results import differences, weights_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.suggest import command
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import read_header

__all__ = [
    "announce",
    "base_encoder",
    "changed_weights",
    "checkpoint_hashes",
    "classification_head",
    "command",
    "finetuned_checkpoint",
    "finetuned_encoder",
    "load_encoder",
    "published_zeroshot",
    "split_of",
    "stored_hash",
    "task_vector",
    "zeroshot_encoder",
]

logger = logging.getLogger(__name__)


def check_start(path: Path, run: Run, mode: str, theta0_hash: str) -> None:
    """Checks that a fine-tuned checkpoint started from the run's zero-shot weights.

    Warns, once, if it was made with another activation than they were.

    Raises:
        UsageError: otherwise.
    """
    facts = read_facts(path)
    found, made = facts["theta0_hash"], _activation(facts["info"])
    if run.zeroshot_path.is_file():
        start = _activation(read_facts(run.zeroshot_path)["info"])
        if None not in (made, start) and made != start:
            _warn_once(
                f"{path} was made with the activation {made}, but {run.zeroshot_path} with "
                f"{start}: their task vector mixes two models. Use files of one origin"
            )
    if not found:
        _warn_once(f"{path} does not say where it started from; taken to be {run.zeroshot_path}")
    elif found != theta0_hash:
        raise UsageError(
            f"{path} was fine-tuned from weights {found[:12]}..., expected those of "
            f"{run.zeroshot_path} ({theta0_hash[:12]}...). Delete it and run: "
            f"{command('finetune', run, mode)}"
        )


def _activation(info: Mapping[str, Any]) -> str | None:
    """The activation that a checkpoint records, see `encoders.built`."""
    facts = info.get(BUILT)
    return facts.get(ACTIVATION) if isinstance(facts, Mapping) else None


def check_split(path: Path, run: Run, task: str) -> None:
    """Warns, once, if a checkpoint may have been trained on pictures that it is evaluated on.

    That is so if it records another split of the task's data than this run has. A published
    checkpoint records none; the public projects' file order alone gives its split again.

    Warns likewise if the split is the same, but its pictures or labels have changed since.
    """
    info = read_facts(path)["info"]
    if "split" not in info and "published" not in info:
        return
    try:
        data = run.data.dataset(f"{task}Val")
        found = split_record(data)
        content = data.content if "content" in info else None
    except UsageError:  # not here; whoever evaluates on it says so
        return
    if isinstance(info.get("split"), dict):
        if any(info["split"].get(part) != found[part] for part in ("train", "val")):
            _warn_once(
                f"{path} was trained on another split of {task} (source "
                f"{info['split'].get('source')}) than this run's (source {found['source']}): its "
                "training pictures may be among those that it is evaluated on. Use the data that "
                "it was trained on, or train it again"
            )
        elif info["split"].get("source") == found["source"] and info.get("content") != content:
            _warn_once(
                f"{path} was trained on other pictures or labels of {task} than this run's, under "
                "the same names: its accuracy may mean nothing. Use the data that it was trained "
                "on, or train it again"
            )
    elif found["source"] != "folder":
        _warn_once(
            f"{path} is a published checkpoint, and {task} comes from the source "
            f"{found['source']}: only the folders of the public projects are sure to give the "
            f"split that it was trained on; {task}Val may hold its training pictures. Use "
            "--data-source=folder"
        )


@functools.cache
def _warn_once(message: str) -> None:
    if ddp.is_main_process():
        logger.warning("%s", message)


def finetuned_checkpoint(run: Run, task: str, mode: str, theta0_hash: str) -> Path:
    """The checked path of a fine-tuned checkpoint.

    Raises:
        MissingFileError: if it is not there, naming the command that makes it.
        UsageError: if it started from other weights.
    """
    path = _finetuned(run, task, mode)
    check_start(path, run, get_mode(mode).training.name, theta0_hash)
    check_split(path, run, task)
    return path


def _finetuned(run: Run, task: str, mode: str) -> Path:
    """The file of a fine-tuned checkpoint; the error for a missing one says how it is made."""
    training = get_mode(mode).training.name
    made_by = command("finetune", run, training, task=task)
    return resolve(run.finetuned_path(task, mode), made_by)


def task_vector(
    run: Run, task: str, mode: str, encoder: ModuleEncoder, theta0_hash: str
) -> TaskVector:
    """The task vector of a task in a mode; post-hoc linearisation uses the standard one.

    Args:
        run: the run.
        task: the task.
        mode: the mode's name.
        encoder: the pre-trained encoder, see `zeroshot_encoder`.
        theta0_hash: its content hash.
    """
    kind = get_mode(mode).task_vector
    return kind(encoder, finetuned_checkpoint(run, task, mode, theta0_hash))


def finetuned_encoder(
    run: Run, task: str, mode: str, encoder: Encoder, theta0_hash: str
) -> Encoder:
    """The fine-tuned encoder of a task; post-hoc it is the standard one, linearised at theta0.

    Args and errors are those of `task_vector`; `encoder` is not changed.
    """
    path = finetuned_checkpoint(run, task, mode, theta0_hash)
    kind = get_mode(mode)
    if not kind.linear or kind.training.linear:
        return load_encoder(path, kind.linear)
    linear = linearized(encoder)  # its parameters move; buffers take no part in the expansion
    theta, theta0 = weights_in(path), linear.theta0()
    buffers = {name: value for name, value in linear.weights().items() if name not in theta0}
    linear.load_weights({**theta, **buffers})
    return linear


def load_encoder(path: str | Path, linear: bool) -> Encoder:
    """The encoder of a checkpoint of any registered kind, see `encoders.registry`.

    Args:
        path: the checkpoint.
        linear: whether to linearise it, at theta0.

    Raises:
        UsageError: if the file does not hold an encoder.
    """
    encoder = (load_linear if linear else load_standard)(path)
    if not is_encoder(encoder):
        raise UsageError(f"{path} holds a {type(encoder).__name__}, expected an image encoder")
    return encoder


@overload
def base_encoder(encoder: ImageEncoder, mode: str) -> ImageEncoders: ...
@overload
def base_encoder(encoder: ModuleEncoder, mode: str) -> ModuleEncoder: ...
def base_encoder(encoder: ModuleEncoder, mode: str) -> ModuleEncoder:
    """The pre-trained encoder as a mode edits it: linearised or not."""
    return linearized(encoder) if get_mode(mode).linear else encoder


def split_of(run: Run, encoder: Encoder, name: str) -> Split:
    """A split of the run's suite, ready for the evaluation of an encoder.

    Args:
        run: the run.
        encoder: gives the preprocessing.
        name: X for the test split, XVal for the validation split.
    """
    head = classification_head(run, name)
    batches = run.data.batches(name, encoder.val_preprocess)
    whole = len(run.data.dataset(name).test)
    return Split(name, head, batches, run.compute, run.feature_cache, whole)


def checkpoint_hashes(run: Run, tasks: list[str], mode: str) -> dict[str, str]:
    """The content hash of the fine-tuned checkpoint of each task, by task."""
    return {task: read_facts(_finetuned(run, task, mode))["hash"] for task in tasks}


def stored_hash(path: Path) -> str | None:
    """The content hash of a checkpoint of ours; None if there is none, or it is damaged."""
    try:
        return (read_header(resolve(path)) or {}).get("hash")
    except UsageError:
        return None


def changed_weights(
    run: Run, mode: str, origin: Mapping[str, Any], tasks: Iterable[str]
) -> list[str]:
    """The weights of a run that are not those of a mode's results, in words.

    Only checkpoints of ours that are there, and whose hashes the results record, are compared.

    Args:
        run: the run.
        mode: the mode.
        origin: the provenance of the results.
        tasks: the tasks whose checkpoints they are of.
    """
    recorded = weights_of(origin)
    files = {"theta0": run.zeroshot_path} | {t: run.finetuned_path(t, mode) for t in tasks}
    now = {name: stored_hash(file) for name, file in files.items() if name in recorded}
    return differences(recorded, {name: value for name, value in now.items() if value})


def announce(run: Run, script: str) -> None:
    """Says which model and folder the run uses."""
    model = run.config.model
    hint = " (the embedded model; --model=ViT-B-32 is CLIP)" if is_at_hand(model) else ""
    if ddp.is_main_process():
        name = run.config.exp_name
        label = f"{script} [{name}]" if name else script
        logger.info("%s: model %s%s, checkpoints in %s", label, model, hint, run.folder)
