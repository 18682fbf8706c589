"""Negates each task vector: forget the task, keep the control set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import (
    announce,
    base_encoder,
    checkpoint_hashes,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.negation import (
    finetuned_accuracies,
    negate_task,
    origin_of,
    with_means,
    zeroshot_accuracies,
)
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import arithmetic_path, check_targets, write_merged
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table, percent
from tangent_arithmetic.run.tracking import tracked
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging


def task_negation(run: Run) -> dict[str, Any]:
    """Every task's negation, with provenance; see `negate_task`."""
    mode, begin = run.mode.name, time.monotonic()
    encoder, theta0_hash = zeroshot_encoder(run)
    singles, base = zeroshot_accuracies(run, theta0_hash), base_encoder(encoder, mode)
    results: dict[str, Any] = {}
    for task in run.tasks:
        tau = task_vector(run, task, mode, encoder, theta0_hash).vector
        results[task] = negate_task(run, task, tau, base, singles)
    hashes = checkpoint_hashes(run, run.tasks, mode)
    results = dict(with_means(results, finetuned_accuracies(run, theta0_hash, hashes)))
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes, **origin_of(run)}
    results["provenance"] = provenance(run, time.monotonic() - begin, **facts)
    return results


def work(run: Run) -> None:
    """Evaluates, writes and prints, in every process of the run."""
    announce(run, "eval_task_negation")
    mode, control = run.mode.name, run.control
    path = arithmetic_path(run, mode, "negations")
    check_targets(run, path, report_path(run))
    with tracked(run, f"negation-{mode}") as tracker:
        results = task_negation(run)
        write_merged(path, results, run)
        tracker.log(
            {f"{t}:{k}": results[t][k] for t in run.tasks for k in ("test", "test_control")}
        )
        page = write_report(run)
        tracker.show("report", page)
    if ddp.is_main_process():
        columns = ("zeroshot", "test", "zeroshot_control", "test_control")
        rows = [
            [task, *(percent(results[task][c]) for c in columns), str(results[task]["coefficient"])]
            for task in run.tasks
        ]
        count = len(rows)
        means = [sum(results[t][c] for t in run.tasks) / count for c in columns]
        header = ["%", "zero-shot", "negated", f"{control} zero-shot", f"{control} negated", "coef"]
        print(markdown_table(header, [*rows, ["mean", *map(percent, means), ""]]))
        print(f"wrote {path} and {page}")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("negate", argv, __doc__)
    setup_logging()
    start(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
