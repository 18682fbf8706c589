"""The encoders, heads and splits of a run.

A fine-tuned checkpoint records the content hash of the weights that it started from; reading it is
an error if those are not the run's zero-shot weights.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.data.registry import split_record
from tangent_arithmetic.data.suites import EMBEDDED_MODEL
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.encoders.base import Encoder, is_encoder
from tangent_arithmetic.encoders.clip import ClipName
from tangent_arithmetic.encoders.heads import is_current, recipe_hash, zeroshot_weights
from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import ImageEncoders, linearized
from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts, resolve
from tangent_arithmetic.encoders.registry import load_linear, load_standard
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.modes import get_mode
from tangent_arithmetic.run.results import ROOT
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import ENCODERS
from tangent_arithmetic.storage.statedict import content_hash

logger = logging.getLogger(__name__)

SUBCOMMANDS = {
    "finetune": "finetune",
    "eval_single_task": "evaluate",
    "eval_task_addition": "add",
    "eval_task_negation": "negate",
    "analyze": "analyze",
}
# flags that determine where a run's files are
PLACE = ["save", "results", "seed", "load"]
COMMAND_FLAGS = ["model", "suite", "data_source", *PLACE, "precision", "sample"]


def command(script: str, run: Run, mode: str | None = None, name: str | None = None) -> str:
    """The command line that makes what is missing, with this run's settings.

    Args:
        script: of a clone, without its ending; without a clone its subcommand is named.
        run: the run.
        mode: a fine-tuning mode.
        name: of what the script is to make, for one that takes names.
    """
    defaults = Config()
    clone = (ROOT / "src" / f"{script}.py").is_file()
    words = [f"python src/{script}.py" if clone else f"tangent-arithmetic {SUBCOMMANDS[script]}"]
    if name is not None:
        words.append(name)
    if mode is not None:
        words.append(f"--finetuning-mode={mode}")
    for name in COMMAND_FLAGS:
        value = getattr(run.config, name)
        if value is not None and value != getattr(defaults, name):
            flag = name.replace("_", "-")
            words.append(f"--{flag}={','.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def zeroshot_encoder(run: Run) -> tuple[ImageEncoder, str]:
    """The run's pre-trained encoder and its content hash; its file is written if it is not there.

    The weights are those of `--load`, or of a published zero-shot file in the run's folder, or the
    model's own.

    Raises:
        UsageError: if the file holds other weights than the model's own or those of `--load`.
    """
    path = run.zeroshot_path
    missing = ddp.broadcast(not path.is_file())
    kept = None if missing else read_facts(path)["hash"]
    override = run.load
    model = run.model
    parsed = ClipName.parse(model)
    known = override is not None or parsed.architecture == EMBEDDED_MODEL
    if kept is not None and (not known or parsed.pretrained is None):
        return ImageEncoder.load(run.model, path), kept
    if override is not None and read_facts(resolve(override), model)["kind"] != "image_encoder":
        raise UsageError(
            f"--load={override} is not a standard encoder; a linear checkpoint or a head cannot be "
            "the pre-trained model"
        )
    published = published_zeroshot(run) if kept is None and override is None else None
    if published is not None:
        encoder = ImageEncoder.load(run.model, published)
    else:
        encoder = ImageEncoder(run.config)
    found = content_hash(encoder.weights())
    if kept is not None and kept != found:
        raise UsageError(
            f"{path} holds other pre-trained weights ({kept[:12]}...) than "
            f"{override or run.model} ({found[:12]}...): runs from different starting "
            "points are not mixed. Name another folder with --save, or delete this one"
        )
    if kept is None:
        if ddp.is_main_process():
            encoder.save(path)
        ddp.barrier()
    return encoder, found


def published_zeroshot(run: Run) -> Path | None:
    """The zero-shot file that came with published checkpoints in the run's folder, if there is one.

    It lies in the folder itself, or, one for each task, in those of the tasks.
    """
    folder = run.folder
    for name in ("zeroshot.pt", "nonlinear_zeroshot.pt"):
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    return None


def check_start(path: Path, run: Run, mode: str, theta0_hash: str) -> None:
    """Checks that a fine-tuned checkpoint started from the run's zero-shot weights.

    Raises:
        UsageError: otherwise.
    """
    found = read_facts(path)["theta0_hash"]
    if not found:
        _warn_once(f"{path} does not say where it started from; taken to be {run.zeroshot_path}")
    elif found != theta0_hash:
        raise UsageError(
            f"{path} was fine-tuned from weights {found[:12]}..., expected those of "
            f"{run.zeroshot_path} ({theta0_hash[:12]}...). Delete it and run: "
            f"{command('finetune', run, mode)}"
        )


def check_split(path: Path, run: Run, task: str) -> None:
    """Warns, once, if a checkpoint may have been trained on pictures that it is evaluated on.

    That is so if it records another split of the task's data than this run has. A published
    checkpoint records none; the public projects' file order alone gives its split again.
    """
    info = read_facts(path)["info"]
    if "split" not in info and "published" not in info:
        return
    try:
        found = split_record(run.data.dataset(f"{task}Val"))
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


def finetuned_checkpoint(run: Run, task: str, mode: str, theta0_hash: str) -> Path:
    """The checked path of a fine-tuned checkpoint.

    Raises:
        MissingFileError: if it is not there, naming the command that makes it.
        UsageError: if it started from other weights.
    """
    training = get_mode(mode).training.name
    path = resolve(run.finetuned_path(task, mode), command("finetune", run, training))
    check_start(path, run, training, theta0_hash)
    check_split(path, run, task)
    return path


def task_vector(
    run: Run, task: str, mode: str, encoder: ImageEncoder, theta0_hash: str
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
    theta, theta0 = load_checkpoint(path, kinds=ENCODERS).theta, linear.theta0()
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


def base_encoder(encoder: ImageEncoder, mode: str) -> ImageEncoders:
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


def classification_head(run: Run, dataset: str) -> ClassificationHead:
    """The zero-shot head of a data set, from the run's folder, or built and kept there.

    A kept head is used only if its model, class names and prompts are those of today.

    Args:
        run: the run.
        dataset: the data set; X and XVal share a head.
    """
    path, name = run.head_path(dataset), run.suite.check(dataset).removesuffix("Val")
    classnames, templates = run.data.classnames(name), get_templates(name, run.suite.name)
    recipe = recipe_hash(run.model, classnames, templates)
    if not ddp.broadcast(is_current(path, recipe)):
        if ddp.is_main_process():
            logger.info("building the zero-shot head of %s", name)
            encoder = ImageEncoder(run.config, keep_lang=True)
            _check_unchanged(run, encoder)
            weights = zeroshot_weights(encoder.model, classnames, templates, run.device)
            head = ClassificationHead(True, weights.cpu(), classnames=classnames)
            head.save(path, model=encoder.model_name, recipe=recipe)
        ddp.barrier()
    return ClassificationHead.load(path)


def _check_unchanged(run: Run, encoder: ImageEncoder) -> None:
    """Checks that a model in a file or folder is still the one that the run began with.

    Raises:
        UsageError: if it has changed: its text tower would not go with the run's encoder.
    """
    path, parsed = run.zeroshot_path, ClipName.parse(encoder.model_name)
    own = (parsed.file or parsed.folder) and run.load is None
    if own and path.is_file() and read_facts(path)["hash"] != content_hash(encoder.weights()):
        raise UsageError(
            f"the weights of {encoder.model_name} are no longer those of {path}, which the run "
            "began with; put them back, or name another folder with --save"
        )


def checkpoint_hashes(run: Run, tasks: list[str], mode: str) -> dict[str, str]:
    """The content hash of the fine-tuned checkpoint of each task, by task."""
    return {task: read_facts(resolve(run.finetuned_path(task, mode)))["hash"] for task in tasks}


def announce(run: Run, script: str) -> None:
    """Says which model and folder the run uses."""
    model = run.config.model
    hint = " (the embedded model; --model=ViT-B-32 is CLIP)" if model == EMBEDDED_MODEL else ""
    if ddp.is_main_process():
        name = run.config.exp_name
        label = f"{script} [{name}]" if name else script
        logger.info("%s: model %s%s, checkpoints in %s", label, model, hint, run.folder)
