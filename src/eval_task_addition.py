"""Adds all task vectors: the coefficient is chosen on validation, the sum reported on test."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

from src import ddp
from src.analysis.report import report_path, write_report
from src.args import parse_arguments, require_mode
from src.data.registry import split_hashes
from src.errors import entry_point
from src.eval import evaluate_task_vector, find_optimal_coef, smallest_split, sweep
from src.logs import setup_logging, wandb_run
from src.results import (
    accuracies_path,
    accuracy_table,
    arithmetic_path,
    check_targets,
    provenance,
    require_results,
    write_results,
)
from src.runs import announce, checkpoint_hashes, command, task_vector, zeroshot_encoder
from src.settings import tasks_of

MODES = ("standard", "linear", "posthoc")


def on_datasets(args: Any, names: list[str], singles: dict[str, float]) -> Any:
    """The settings with these data sets to evaluate on, and what to normalise by."""
    changed = copy.copy(args)
    changed.eval_datasets, changed.control_dataset = names, None
    changed.finetuning_accuracies = {name: singles[name] for name in names}
    return changed


def task_addition(args: Any) -> dict[str, Any]:
    """The sum of all task vectors, evaluated on every task.

    The coefficient is the smallest one with the best mean normalised accuracy on the validation
    splits. Accuracies are normalised by those of the same mode's single-task encoders on the same
    split.

    Returns:
        {"test": metrics, "val": {coefficient: metrics}, "coefficient", "zeroshot", "provenance"}.
    """
    mode, tasks, start = args.finetuning_mode, tasks_of(args), time.monotonic()
    encoder, theta0_hash = zeroshot_encoder(args)
    first, *others = (task_vector(args, task, mode, encoder, theta0_hash) for task in tasks)
    total = sum(others, start=first)
    hashes = checkpoint_hashes(args, tasks, mode)
    made_by = command("eval_single_task", args, mode)
    path, needed = accuracies_path(args, mode), [*tasks, *(f"{task}Val" for task in tasks)]
    singles = require_results(path, args, theta0_hash, made_by, hashes, needed)
    posthoc = mode == "posthoc"

    on_val = on_datasets(args, [f"{task}Val" for task in tasks], singles)
    val = evaluate_task_vector(total, encoder, on_val, posthoc)
    coef = find_optimal_coef(val, num_images=smallest_split(args, on_val.eval_datasets))

    on_test = on_datasets(args, tasks, singles)
    tested = sweep(total, encoder, on_test, [0.0, coef], posthoc)
    splits = split_hashes(args, [*on_val.eval_datasets, *on_test.eval_datasets])
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes, "splits": splits}
    return {
        "test": tested[coef],
        "val": val,
        "coefficient": coef,
        "zeroshot": tested[0.0],
        "provenance": provenance(args, time.monotonic() - start, **facts),
    }


def addition_table(results: dict[str, Any], tasks: Sequence[str], mode: str) -> str:
    """Zero-shot and sum, absolute and normalised; a dash where no normalised accuracy exists."""
    rows = {}
    for label, key in (("zero-shot", "zeroshot"), (f"sum, {mode}", "test")):
        for kind, metric in (("absolute", "top1"), ("normalised", "normalized_top1")):
            rows[f"{label}, {kind}"] = [results[key].get(f"{task}:{metric}") for task in tasks]
    return accuracy_table(tasks, rows)


def work(args: Any) -> None:
    """Evaluates, writes and prints, in every process of the run."""
    announce(args, "eval_task_addition")
    mode = args.finetuning_mode
    path = arithmetic_path(args, mode, "additions")
    check_targets(args, path, report_path(args))
    with wandb_run(args, f"addition-{mode}") as run:
        results = task_addition(args)
        write_results(path, results, args)
        run.log({**results["test"], "coefficient": results["coefficient"]})
    page = write_report(args)
    if ddp.is_main_process():
        print(addition_table(results, tasks_of(args), mode))
        print(
            f"coefficient {results['coefficient']}, chosen on validation; wrote {path} and {page}"
        )


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse_arguments(argv, __doc__)
    require_mode(args, "eval_task_addition.py", MODES)
    setup_logging()
    ddp.run(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
