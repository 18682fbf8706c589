"""The encoders of a run, found where `finetune.py` puts them and never mixed.

Every fine-tuned checkpoint knows the content hash of the weights that it started from; whoever
reads it here gets an error if those are not the run's zero-shot weights.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from src import ddp
from src.args import Config
from src.checkpoints import ENCODERS, load_checkpoint, read_facts, resolve
from src.clip import ClipName
from src.data.registry import dataset_for, split_record
from src.errors import UsageError
from src.linearize import LinearizedImageEncoder
from src.modeling import ImageEncoder
from src.settings import finetuned_path, pretrained_override, run_dir, setting, zeroshot_path
from src.statedict import content_hash
from src.task_vectors import TASK_VECTORS, TaskVector
from src.tasks import EMBEDDED_MODEL

logger = logging.getLogger(__name__)

# what a command needs to be told of this run for its files to be found again
COMMAND_FLAGS = (
    "model", "suite", "data_source", "save", "results", "seed", "load", "precision", "sample",
)  # fmt: skip


def command(script: str, args: Any, mode: str | None = None, name: str | None = None) -> str:
    """The command line that makes what is missing, with this run's settings.

    Args:
        script: without its ending.
        args: settings of the run.
        mode: a fine-tuning mode.
        name: of what the script is to make, for one that takes names.
    """
    defaults = Config()
    words = [f"python src/{script}.py"]
    if name is not None:
        words.append(name)
    if mode is not None:
        words.append(f"--finetuning-mode={mode}")
    for name in COMMAND_FLAGS:
        value = setting(args, name)
        if value is not None and value != getattr(defaults, name):
            flag = name.replace("_", "-")
            words.append(f"--{flag}={','.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def zeroshot_encoder(args: Any) -> tuple[ImageEncoder, str]:
    """The run's pre-trained encoder and its content hash; its file is written if it is not there.

    The weights are those of `--load`, or of a published zero-shot file in the run's folder, or the
    model's own.

    Raises:
        UsageError: if the file holds other weights than the model's own or those of `--load`.
    """
    path = zeroshot_path(args)
    missing = ddp.all_agree(not path.is_file())
    kept = None if missing else read_facts(path)["hash"]
    override = pretrained_override(args)
    model = str(setting(args, "model"))
    parsed = ClipName.parse(model)
    known = override is not None or parsed.architecture == EMBEDDED_MODEL
    if kept is not None and (not known or parsed.pretrained is None):
        return ImageEncoder.load(str(setting(args, "model")), path), kept
    if override is not None and read_facts(resolve(override), model)["kind"] != "image_encoder":
        raise UsageError(
            f"--load={override} is not a standard encoder; a linear checkpoint or a head cannot be "
            "the pre-trained model"
        )
    published = published_zeroshot(args) if kept is None and override is None else None
    if published is not None:
        encoder = ImageEncoder.load(str(setting(args, "model")), published)
    else:
        encoder = ImageEncoder(args)
    found = content_hash(encoder.weights())
    if kept is not None and kept != found:
        raise UsageError(
            f"{path} holds other pre-trained weights ({kept[:12]}...) than "
            f"{override or setting(args, 'model')} ({found[:12]}...): runs from different starting "
            "points are not mixed. Name another folder with --save, or delete this one"
        )
    if kept is None:
        if ddp.is_main_process():
            encoder.save(path)
        ddp.barrier()
    return encoder, found


def published_zeroshot(args: Any) -> Path | None:
    """The zero-shot file that came with published checkpoints in the run's folder, if there is one.

    It lies in the folder itself, or, one for each task, in those of the tasks.
    """
    folder = run_dir(args)
    for name in ("zeroshot.pt", "nonlinear_zeroshot.pt"):
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    return None


def check_start(path: Path, args: Any, theta0_hash: str) -> None:
    """Checks that a fine-tuned checkpoint started from the run's zero-shot weights.

    Raises:
        UsageError: otherwise.
    """
    found = read_facts(path)["theta0_hash"]
    if not found:
        _warn_once(f"{path} does not say where it started from; taken to be {zeroshot_path(args)}")
    elif found != theta0_hash:
        raise UsageError(
            f"{path} was fine-tuned from weights {found[:12]}..., expected those of "
            f"{zeroshot_path(args)} ({theta0_hash[:12]}...). Delete it and run: "
            f"{command('finetune', args, 'linear' if 'linear' in path.name else 'standard')}"
        )


def check_split(path: Path, args: Any, task: str) -> None:
    """Warns, once, if a checkpoint may have been trained on pictures that it is evaluated on.

    That is so if it records another split of the task's data than this run has. A published
    checkpoint records none; the public projects' file order alone gives its split again.
    """
    info = read_facts(path)["info"]
    if "split" not in info and "published" not in info:
        return
    try:
        found = split_record(dataset_for(args, f"{task}Val"))
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


def finetuned_checkpoint(args: Any, task: str, mode: str, theta0_hash: str) -> Path:
    """The checked path of a fine-tuned checkpoint.

    Raises:
        MissingFileError: if it is not there, naming the command that makes it.
        UsageError: if it started from other weights.
    """
    made_by = command("finetune", args, "linear" if mode == "linear" else "standard")
    path = resolve(finetuned_path(args, task, mode), made_by)
    check_start(path, args, theta0_hash)
    check_split(path, args, task)
    return path


def task_vector(
    args: Any, task: str, mode: str, encoder: ImageEncoder, theta0_hash: str
) -> TaskVector:
    """The task vector of a task; post-hoc linearisation uses the standard one.

    Args:
        args: settings.
        task: the task.
        mode: "standard", "linear" or "posthoc".
        encoder: the pre-trained encoder, see `zeroshot_encoder`.
        theta0_hash: its content hash.
    """
    return TASK_VECTORS[mode](encoder, finetuned_checkpoint(args, task, mode, theta0_hash))


def finetuned_encoder(
    args: Any, task: str, mode: str, encoder: ImageEncoder, theta0_hash: str
) -> ImageEncoder | LinearizedImageEncoder:
    """The fine-tuned encoder of a task; post-hoc it is the standard one, linearised at theta0.

    Args:
        args: settings.
        task: the task.
        mode: "standard", "linear" or "posthoc".
        encoder: the pre-trained encoder, see `zeroshot_encoder`; untouched.
        theta0_hash: its content hash.
    """
    path = finetuned_checkpoint(args, task, mode, theta0_hash)
    if mode == "posthoc":  # the parameters move; buffers take no part in the expansion
        linear = LinearizedImageEncoder(image_encoder=encoder)
        theta = load_checkpoint(path, kinds=ENCODERS).theta
        own = linear.model.module_buffers()
        buffers = {n: v for n, v in linear.weights().items() if n in own}
        linear.load_weights({**theta, **buffers})
        return linear
    return (LinearizedImageEncoder if mode == "linear" else ImageEncoder).load(path)


def checkpoint_hashes(args: Any, tasks: list[str], mode: str) -> dict[str, str]:
    """The content hash of the fine-tuned checkpoint of each task, by task."""
    return {task: read_facts(resolve(finetuned_path(args, task, mode)))["hash"] for task in tasks}


def announce(args: Any, script: str) -> None:
    """Says which model and folder the run uses."""
    model = setting(args, "model")
    hint = " (the embedded model; --model=ViT-B-32 is CLIP)" if model == EMBEDDED_MODEL else ""
    if ddp.is_main_process():
        name = setting(args, "exp_name")
        label = f"{script} [{name}]" if name else script
        logger.info("%s: model %s%s, checkpoints in %s", label, model, hint, run_dir(args))
