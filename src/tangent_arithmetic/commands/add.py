"""Adds all task vectors: the coefficient is chosen on validation, the sum reported on test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.arithmetic.addition import add
from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.metrics import main_metric
from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import (
    announce,
    base_encoder,
    checkpoint_hashes,
    command,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.results import (
    accuracies_path,
    accuracy_table,
    arithmetic_path,
    check_targets,
    provenance,
    require_results,
    write_results,
)
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tracking import tracked
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging


def task_addition(run: Run) -> dict[str, Any]:
    """The sum of all task vectors of a run, see `arithmetic.addition.add`, with provenance.

    Accuracies are normalised by those of the same mode's single-task encoders on the same split.
    """
    mode, tasks, begin = run.mode.name, run.tasks, time.monotonic()
    encoder, theta0_hash = zeroshot_encoder(run)
    first, *others = (task_vector(run, task, mode, encoder, theta0_hash) for task in tasks)
    total = sum(others, start=first)
    hashes = checkpoint_hashes(run, tasks, mode)
    made_by = command("eval_single_task", run, mode)
    validation = [f"{task}Val" for task in tasks]
    path, needed = accuracies_path(run, mode), [*tasks, *validation]
    singles = require_results(path, run, theta0_hash, made_by, hashes, needed)
    base = base_encoder(encoder, mode)
    results = add(
        base,
        total.vector,
        [split_of(run, base, name) for name in validation],
        [split_of(run, base, name) for name in tasks],
        singles,
        coefficients(run.config.n_eval_points),
    )
    splits = run.data.split_hashes([*validation, *tasks])
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes, "splits": splits}
    return {**results, "provenance": provenance(run, time.monotonic() - begin, **facts)}


def addition_table(results: dict[str, Any], tasks: Sequence[str], mode: str) -> str:
    """Zero-shot and sum, absolute and normalised; a dash where no normalised accuracy exists."""
    rows = {}
    for label, key in (("zero-shot", "zeroshot"), (f"sum, {mode}", "test")):
        mains = [f"{task}:{main_metric(results[key], task)}" for task in tasks]
        normalised = [main.replace(":", ":normalized_") for main in mains]
        for kind, names in (("absolute", mains), ("normalised", normalised)):
            rows[f"{label}, {kind}"] = [results[key].get(name) for name in names]
    return accuracy_table(tasks, rows)


def work(run: Run) -> None:
    """Evaluates, writes and prints, in every process of the run."""
    announce(run, "eval_task_addition")
    mode = run.mode.name
    path = arithmetic_path(run, mode, "additions")
    check_targets(run, path, report_path(run))
    with tracked(run, f"addition-{mode}") as tracker:
        results = task_addition(run)
        write_results(path, results, run)
        tracker.log({**results["test"], "coefficient": results["coefficient"]})
        page = write_report(run)
        tracker.show("report", page)
    if ddp.is_main_process():
        print(addition_table(results, run.tasks, mode))
        print(
            f"coefficient {results['coefficient']}, chosen on validation; wrote {path} and {page}"
        )


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("add", argv, __doc__)
    setup_logging()
    start(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
