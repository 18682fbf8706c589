"""Negates each task vector: forget the task, keep the control set."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

from src import ddp
from src.analysis.report import report_path, write_report
from src.args import parse_arguments, require_mode
from src.data.registry import split_hashes
from src.errors import UsageError, entry_point
from src.eval import (
    evaluate_task_vector,
    evaluate_task_vector_at_coef,
    find_optimal_coef,
    smallest_split,
)
from src.logs import setup_logging, wandb_run
from src.modeling import ImageEncoder
from src.results import (
    accuracies_path,
    arithmetic_path,
    check_targets,
    markdown_table,
    percent,
    provenance,
    require_results,
    write_merged,
)
from src.runs import announce, checkpoint_hashes, command, task_vector, zeroshot_encoder
from src.settings import control_of, setting, tasks_of
from src.task_vectors import TaskVector

MODES = ("standard", "linear", "posthoc")


def negate(
    args: Any, task: str, tau: TaskVector, encoder: ImageEncoder, singles: dict[str, Any]
) -> dict[str, Any]:
    """One task's negation.

    The coefficient is the smallest one with the lowest validation accuracy on the task, among those
    at which the control set keeps `args.control_threshold` of its zero-shot accuracy.

    Args:
        args: settings.
        task: the task to forget.
        tau: its task vector.
        encoder: the pre-trained encoder.
        singles: its zero-shot accuracies, by data set.

    Returns:
        {"test", "test_control", "val": {coefficient: metrics}, "coefficient", "zeroshot", ...}.
    """
    posthoc, control, negated = args.finetuning_mode == "posthoc", control_of(args), -tau
    chosen = copy.copy(args)
    chosen.eval_datasets, chosen.control_dataset = [f"{task}Val"], f"{control}Val"
    val = evaluate_task_vector(negated, encoder, chosen, posthoc)
    least = setting(args, "control_threshold") * singles[f"{control}Val"]
    coef = find_optimal_coef(
        val,
        metric=f"{task}Val:top1",
        minimize=True,
        control_metric=f"{control}Val:top1",
        control_metric_threshold=least,
        num_images=smallest_split(args, chosen.eval_datasets),
    )
    chosen.eval_datasets, chosen.control_dataset = [task], control
    test = evaluate_task_vector_at_coef(negated, encoder, chosen, coef, posthoc)
    return {
        "test": test[f"{task}:top1"],
        "test_control": test[f"{control}:top1"],
        "val": val,
        "coefficient": coef,
        "qualified": val[str(coef)][f"{control}Val:top1"] >= least,
        "zeroshot": singles[task],
        "zeroshot_control": singles[control],
    }


def zeroshot_needed(args: Any) -> list[str]:
    """The data sets whose zero-shot accuracies negations need.

    Raises:
        UsageError: if one of the tasks is the control set.
    """
    tasks, control = tasks_of(args), control_of(args)
    if control in tasks:
        raise UsageError(
            f"--tasks names {control}, which is the control set; leave it out, or name another one "
            "with --control-dataset"
        )
    return [*tasks, control, f"{control}Val"]


def task_negation(args: Any) -> dict[str, Any]:
    """Every task's negation, with provenance; see `negate`."""
    mode, tasks, start = args.finetuning_mode, tasks_of(args), time.monotonic()
    encoder, theta0_hash = zeroshot_encoder(args)
    made_by = command("eval_single_task", args, "none")
    path = accuracies_path(args, "none")
    singles = require_results(path, args, theta0_hash, made_by, needed=zeroshot_needed(args))
    results: dict[str, Any] = {}
    for task in tasks:
        tau = task_vector(args, task, mode, encoder, theta0_hash)
        results[task] = negate(args, task, tau, encoder, singles)
    hashes = checkpoint_hashes(args, tasks, mode)
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes}
    names = [f"{name}{end}" for name in (*tasks, control_of(args)) for end in ("Val", "")]
    splits = split_hashes(args, names)
    results["provenance"] = provenance(args, time.monotonic() - start, **facts, splits=splits)
    return results


def work(args: Any) -> None:
    """Evaluates, writes and prints, in every process of the run."""
    announce(args, "eval_task_negation")
    mode, control = args.finetuning_mode, control_of(args)
    path = arithmetic_path(args, mode, "negations")
    check_targets(args, path, report_path(args))
    with wandb_run(args, f"negation-{mode}") as run:
        results = task_negation(args)
        write_merged(path, results, args)
        run.log(
            {f"{t}:{k}": results[t][k] for t in tasks_of(args) for k in ("test", "test_control")}
        )
    page = write_report(args)
    if ddp.is_main_process():
        columns = ("zeroshot", "test", "zeroshot_control", "test_control")
        rows = [
            [task, *(percent(results[task][c]) for c in columns), str(results[task]["coefficient"])]
            for task in tasks_of(args)
        ]
        count = len(rows)
        means = [sum(results[t][c] for t in tasks_of(args)) / count for c in columns]
        header = ["%", "zero-shot", "negated", f"{control} zero-shot", f"{control} negated", "coef"]
        print(markdown_table(header, [*rows, ["mean", *map(percent, means), ""]]))
        print(f"wrote {path} and {page}")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv, __doc__)
    require_mode(args, "eval_task_negation.py", MODES)
    setup_logging()
    ddp.run(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
