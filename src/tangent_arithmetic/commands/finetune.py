"""Fine-tunes the image encoder on every task, in standard or linear mode."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.identity import times_hash
from tangent_arithmetic.data.registry import ImageDataset, split_record
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import announce, classification_head, zeroshot_encoder
from tangent_arithmetic.run.objectives import method_of, objective_of, trained_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tracking import append_result, tracked
from tangent_arithmetic.run.validation import Validation
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import remove_parts
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.software import software
from tangent_arithmetic.storage.states import RunStates, check_settings
from tangent_arithmetic.training.adapters import save_adapters
from tangent_arithmetic.training.loop import TrainingData, seed_everything, train
from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.resume import Snapshots
from tangent_arithmetic.training.stopping import WATCHED, Stopping

logger = logging.getLogger(__name__)


def is_done(path: Path, wanted: dict[str, Any], theta0_hash: str) -> bool:
    """Whether a checkpoint exists and was made with the wanted settings.

    Raises:
        UsageError: if it was made with others; it is not overwritten.
    """
    if not path.is_file():
        return False
    facts = read_facts(path)
    recipe = {**Recipe.defaults(), **facts["info"].get("recipe", {})}  # before there were flags
    made = {**recipe, "seed": facts["info"].get("seed"), "theta0": facts["theta0_hash"]}
    made |= {name: facts["info"].get(name) for name in ("target", "patience")}
    made |= facts["info"].get("method", {})
    check_settings(path, made, {**wanted, "theta0": theta0_hash}, "--save")
    return True


def finetune(run: Run, task: str) -> Path:
    """Fine-tunes one task and writes its checkpoint, unless it exists.

    Args:
        run: the run; `finetuning_mode` is "standard" or "linear".
        task: the data set, without Val.

    Returns:
        The checkpoint's path.

    Raises:
        UsageError: if a checkpoint, or the state of an interrupted run, has other settings.
    """
    mode, seed = run.mode.name, run.seed
    path, recipe = run.finetuned_path(task, mode), run.recipe(task)
    encoder, theta0_hash = zeroshot_encoder(run)
    method = method_of(run, task)
    wanted = {**asdict(recipe), **method, "seed": seed}
    ends = {"target": run.config.target, "patience": run.config.patience}
    wanted |= ends
    if ddp.broadcast(is_done(path, wanted, theta0_hash)):
        _check_origin(path, run, task)
        if ddp.is_main_process():
            RunStates(path, {}).clean_up()
        logger.info("%s %s: done before, skipped (%s)", task, mode, path)
        return path
    data, head = run.data.dataset(f"{task}Val"), classification_head(run, task)
    origin = {
        "theta0_hash": theta0_hash,
        **_of_data(run, task, data),
        **_of_head(run, task),
        **ends,
    }
    origin |= {"method": method} if method else {}
    made = {
        **wanted,
        **origin,
        "mode": mode,
        "times": times_hash(data.train),
        "preprocess": getattr(encoder.train_preprocess, "recipe", None),
        **software(),
    }
    states = RunStates(path, made, run.config.state_every, "--restart")
    with _alone(states):
        if run.config.restart and ddp.is_main_process():
            states.clear()
        ddp.barrier()
        facts = None
        if not ddp.broadcast(is_done(path, wanted, theta0_hash)):  # by a run that has just ended
            facts = _finetune(run, task, encoder, head, data, origin, states)
        if ddp.is_main_process():
            states.remove()
        ddp.barrier()
    if facts is not None:
        append_result(run, {"file": str(path), "task": task, "mode": mode, **facts})
    return path


def _of_data(run: Run, task: str, data: ImageDataset) -> dict[str, Any]:
    """The pictures that a checkpoint is made of: their split and hashes of their content."""
    facts: dict[str, Any] = {"split": split_record(data), "content": data.content}
    others = method_of(run, task).get("others", [])
    contents = {name: run.data.dataset(f"{name}Val").content for name in others}
    return facts | ({"others_content": contents} if others else {})


def _of_head(run: Run, task: str) -> dict[str, Any]:
    """The content hash of the task's head, if it has been built."""
    path = run.head_path(task)
    return {"head": read_facts(path)["hash"]} if path.is_file() else {}


def _check_origin(path: Path, run: Run, task: str) -> None:
    """Checks that a finished checkpoint used the current pictures and head, if they exist.

    Raises:
        UsageError: naming what differs.
    """
    info, now = read_facts(path)["info"], _of_head(run, task)
    with contextlib.suppress(MissingFileError):
        now |= _of_data(run, task, run.data.dataset(f"{task}Val"))
    recorded = {name: now[name] for name in now if name in info}  # earlier versions had fewer
    check_settings(path, info, recorded, "--save", "of other data")


@contextlib.contextmanager
def _alone(states: RunStates) -> Iterator[None]:
    """Locks the run's files for all its ranks: rank 0 holds the lock."""
    with contextlib.ExitStack() as stack:
        refused = None
        if ddp.is_main_process():
            try:
                stack.enter_context(states.locked())
            except UsageError as error:
                refused = str(error)
        if (reason := ddp.broadcast(refused)) is not None:
            raise UsageError(reason)
        yield


def _finetune(
    run: Run,
    task: str,
    encoder: ModuleEncoder,
    head: ClassificationHead,
    data: ImageDataset,
    origin: dict[str, Any],
    states: RunStates,
) -> dict[str, Any]:
    """Trains, writes the checkpoint, and returns the facts of the training."""
    mode, seed, path = run.mode, run.seed, states.checkpoint
    validation = Validation(run, task, encoder)
    seed_everything(seed)
    tuned = trained_encoder(run, encoder, head, data, states)
    classifier = ImageClassifier(tuned, head)
    classifier.freeze_head()
    classifier.to(run.device)

    def write(target: Path, **info: Any) -> None:
        if ddp.is_main_process():
            tuned.save(target, task=task, mode=mode.name, **origin, **info)

    def save(target: Path, **info: Any) -> None:
        write(target, **info)
        ddp.barrier()

    def snapshot(step: int) -> None:
        save(path.with_name(f"{mode.prefix}checkpoint_{step}.safetensors"), step=step)

    with tracked(run, f"finetune-{mode.name}-{task}") as tracker:

        def accuracy(step: int) -> float:
            tracker.log(validation.measure(f"step {step}", tuned), step)
            return validation.values[f"step {step}"]

        tracker.log(validation.measure("before", encoder), 0)  # a linearisation has the same
        facts = train(
            classifier,
            TrainingData(data.train, tuned.train_preprocess, run.num_workers),
            run.recipe(task),
            objective=objective_of(run, task, data, classifier),
            seed=seed,
            snapshots=Snapshots(states, run.config.checkpoint_every, snapshot),
            tracker=tracker,
            description=f"{task} {mode.name}",
            stopping=_stopping(run, accuracy),
        )
        if ddp.is_main_process():
            save_adapters(tuned, path.with_name(f"{path.stem}_adapters"))
        try:
            after = validation.measure("after", tuned)
        except BaseException:
            write(path, **facts)  # a failed evaluation costs no training
            raise
        facts["validation"] = validation.facts
        save(path, **facts)  # before W&B ends, which may fail
        tracker.log(after, facts["steps"])
    spent = f"{facts['steps']} of {facts['planned']} steps in {facts['seconds']:.0f} s"
    loss, told = facts["last_epoch_loss"], validation.told()
    logger.info("%s %s: %s, loss %.3f, %s; wrote %s", task, mode.name, spent, loss, told, path)
    return facts


def _stopping(run: Run, measure: Callable[[int], float]) -> Stopping:
    """Measurements to decide on the run's end, or for W&B."""
    stopping = Stopping(measure, run.config.target, run.config.patience)
    if not stopping.decides:
        stopping.checks = WATCHED if run.config.wandb else 0
    return stopping


def work(run: Run) -> None:
    """Fine-tunes every task of the run, in every process of it."""
    announce(run, "finetune")
    tasks = run.train_datasets
    if ddp.is_main_process():  # partial files that killed runs left
        for path in (run.zeroshot_path, *(run.head_path(task) for task in tasks)):
            remove_parts(path.parent, path.name)
    for i, task in enumerate(tasks):
        logger.info("task %d of %d: %s", i + 1, len(tasks), task)
        finetune(run, task)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("finetune", argv, __doc__)
    setup_logging()
    start(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
