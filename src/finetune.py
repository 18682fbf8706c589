"""Fine-tunes the image encoder on every task, in standard or linear mode."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src import ddp
from src.args import parse_arguments, require_mode
from src.checkpoints import read_facts
from src.data.registry import ImageDataset, dataset_for, split_record
from src.errors import UsageError, entry_point
from src.heads import get_classification_head
from src.linearize import LinearizedImageEncoder
from src.logs import append_result, setup_logging, wandb_run
from src.modeling import ImageClassifier, ImageEncoder
from src.runs import announce, zeroshot_encoder
from src.settings import (
    PREFIX,
    device_of,
    finetuned_path,
    num_workers_of,
    recipe_for,
    seed_of,
    setting,
    train_datasets,
)
from src.states import RunStates
from src.training import Snapshots, seed_everything, train

logger = logging.getLogger(__name__)


def is_done(path: Path, wanted: dict[str, Any], theta0_hash: str) -> bool:
    """Whether a checkpoint is there and was made with the wanted settings.

    Raises:
        UsageError: if it was made with others; it is not overwritten.
    """
    if not path.is_file():
        return False
    facts = read_facts(path)
    recipe = {"precision": "fp32", **facts["info"].get("recipe", {})}  # it was so before the flag
    found = {**recipe, "seed": facts["info"].get("seed")}
    differ = [f"{k} {found.get(k)} instead of {v}" for k, v in wanted.items() if found.get(k) != v]
    if facts["theta0_hash"] != theta0_hash:
        differ.append("other pre-trained weights")
    if differ:
        raise UsageError(
            f"{path} exists and was made with other settings ({', '.join(differ)}). Keep it and "
            "name another folder with --save, or delete it"
        )
    return True


def finetune(args: Any, task: str) -> Path:
    """Fine-tunes one task and writes its checkpoint; what is done is skipped.

    Args:
        args: settings; `finetuning_mode` is "standard" or "linear".
        task: the data set, without Val.

    Returns:
        The checkpoint's path.
    """
    mode, seed = args.finetuning_mode, seed_of(args)
    path, recipe = finetuned_path(args, task, mode), recipe_for(args, task)
    encoder, theta0_hash = zeroshot_encoder(args)
    wanted = {**asdict(recipe), "seed": seed}
    if ddp.all_agree(is_done(path, wanted, theta0_hash)):
        logger.info("%s %s: done before, skipped (%s)", task, mode, path)
        return path
    data = dataset_for(args, f"{task}Val")
    split = split_record(data)
    made = {**wanted, "mode": mode, "theta0_hash": theta0_hash, "split": split}
    states = RunStates(path, made, setting(args, "state_every"))
    with _alone(states):
        if not ddp.all_agree(is_done(path, wanted, theta0_hash)):  # by a run that has just ended
            _finetune(
                args, task, encoder, data, {"theta0_hash": theta0_hash, "split": split}, states
            )
        if ddp.is_main_process():
            states.remove()
        ddp.barrier()
    return path


@contextlib.contextmanager
def _alone(states: RunStates) -> Iterator[None]:
    """Keeps other runs out of this run's files; the first process does so for all."""
    with contextlib.ExitStack() as stack:
        refused = None
        if ddp.is_main_process():
            try:
                stack.enter_context(states.locked())
            except UsageError as error:
                refused = str(error)
        if (reason := ddp.all_agree(refused)) is not None:
            raise UsageError(reason)
        yield


def _finetune(
    args: Any,
    task: str,
    encoder: ImageEncoder,
    data: ImageDataset,
    origin: dict[str, Any],
    states: RunStates,
) -> None:
    """Trains, and writes the checkpoint."""
    mode, seed, path = args.finetuning_mode, seed_of(args), states.checkpoint
    seed_everything(seed)
    tuned = LinearizedImageEncoder(image_encoder=encoder) if mode == "linear" else encoder
    classifier = ImageClassifier(tuned, get_classification_head(args, task))
    classifier.freeze_head()

    def save(target: Path, **info: Any) -> None:
        if ddp.is_main_process():
            tuned.save(target, task=task, mode=mode, **origin, **info)
        ddp.barrier()

    def snapshot(step: int) -> None:
        save(path.with_name(f"{PREFIX[mode]}checkpoint_{step}.safetensors"), step=step)

    with wandb_run(args, f"finetune-{mode}-{task}") as run:
        facts = train(
            classifier,
            data.train,
            tuned.train_preprocess,
            recipe_for(args, task),
            seed,
            device_of(args),
            f"{task} {mode}",
            num_workers_of(args),
            Snapshots(states, setting(args, "checkpoint_every"), snapshot),
            run,
        )
    save(path, **facts)
    append_result(args, {"file": str(path), "task": task, "mode": mode, **facts})
    logger.info(
        "%s %s: %d steps in %.0f s, loss %.3f, wrote %s",
        task, mode, facts["steps"], facts["seconds"], facts["last_epoch_loss"], path,
    )  # fmt: skip


def work(args: Any) -> None:
    """Fine-tunes every task of the run, in every process of it."""
    announce(args, "finetune")
    tasks = train_datasets(args)
    for i, task in enumerate(tasks):
        logger.info("task %d of %d: %s", i + 1, len(tasks), task)
        finetune(args, task)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv, __doc__)
    require_mode(args, "finetune.py", ("standard", "linear"))
    setup_logging()
    ddp.run(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
