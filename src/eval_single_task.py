"""Evaluates the pre-trained encoder, or each fine-tuned one, on its own task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from src import ddp
from src.analysis.report import report_path, write_report
from src.args import parse_arguments, require_mode
from src.data.registry import split_hashes
from src.errors import entry_point
from src.eval import Encoder, eval_single_dataset
from src.logs import setup_logging, wandb_run
from src.results import (
    accuracies_path,
    accuracy_table,
    check_targets,
    provenance,
    write_merged,
)
from src.runs import announce, checkpoint_hashes, finetuned_encoder, zeroshot_encoder
from src.settings import control_of, eval_datasets

MODES = ("none", "standard", "linear", "posthoc")


def single_task_accuracies(args: Any) -> dict[str, Any]:
    """Top-1 of each task's encoder on the task's validation and test split, with provenance.

    In mode "none" the pre-trained encoder is evaluated, on the control set too.
    """
    mode, start = args.finetuning_mode, time.monotonic()
    base, theta0_hash = zeroshot_encoder(args)
    tasks = list(dict.fromkeys(name.removesuffix("Val") for name in eval_datasets(args)))
    accuracies: dict[str, Any] = {}
    for task in dict.fromkeys([*tasks, control_of(args)]) if mode == "none" else tasks:
        encoder: Encoder = base
        if mode != "none":
            encoder = finetuned_encoder(args, task, mode, base, theta0_hash)
        for name in (f"{task}Val", task):
            accuracies[name] = eval_single_dataset(encoder, name, args)["top1"]
    hashes = {} if mode == "none" else checkpoint_hashes(args, tasks, mode)
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes}
    splits = split_hashes(args, list(accuracies))
    accuracies["provenance"] = provenance(args, time.monotonic() - start, **facts, splits=splits)
    return accuracies


def work(args: Any) -> None:
    """Evaluates, writes and prints, in every process of the run."""
    announce(args, "eval_single_task")
    mode = args.finetuning_mode
    path = accuracies_path(args, mode)
    check_targets(args, path, report_path(args))
    with wandb_run(args, f"single-{mode}") as run:
        accuracies = single_task_accuracies(args)
        write_merged(path, accuracies, args)
        run.log({k: v for k, v in accuracies.items() if k != "provenance"})
    page = write_report(args)
    if ddp.is_main_process():
        tasks = list(dict.fromkeys(name.removesuffix("Val") for name in eval_datasets(args)))
        label = "zero-shot" if mode == "none" else mode
        rows = {f"{label}, {split}": [accuracies[n + end] for n in tasks]
                for split, end in (("validation", "Val"), ("test", ""))}  # fmt: skip
        print(accuracy_table(tasks, rows))
        if mode == "none":
            control = control_of(args)
            print(f"control {control}: {100 * accuracies[control]:.1f} on test")
        print(f"wrote {path} and {page}")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv, __doc__)
    require_mode(args, "eval_single_task.py", MODES)
    setup_logging()
    ddp.run(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
