"""Adds all task vectors: the coefficient is chosen on validation, the sum reported on test."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tangent_arithmetic.arithmetic.addition import add
from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.interference import Matrix, matrix, means
from tangent_arithmetic.arithmetic.metrics import main_metric
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.encoders.base import LinearEncoder, is_linear
from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.heads import evaluated_on
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
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import (
    accuracies_path,
    arithmetic_path,
    check_targets,
    require_results,
    write_results,
)
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import accuracy_table, percent
from tangent_arithmetic.run.tracking import tracked
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging

IMAGES = 64  # of each task, on which interference is measured with every sum


def task_addition(run: Run) -> dict[str, Any]:
    """The sum of all task vectors of a run, see `arithmetic.addition.add`, with provenance.

    Accuracies are normalised by those of the same mode's single-task encoders on the same split.
    Linear modes have the matrix "interference" too, see `interference_of`.
    """
    mode, tasks, begin = run.mode.name, run.tasks, time.monotonic()
    encoder, theta0_hash = zeroshot_encoder(run)
    vectors = {task: task_vector(run, task, mode, encoder, theta0_hash) for task in tasks}
    total = functools.reduce(operator.add, vectors.values())
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
    if is_linear(base):
        results["interference"] = interference_of(run, base, vectors)
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes, **evaluated_on(run, needed)}
    return {**results, "provenance": provenance(run, time.monotonic() - begin, **facts)}


def interference_of(run: Run, base: LinearEncoder, vectors: Mapping[str, TaskVector]) -> Matrix:
    """The interference of each vector on `IMAGES` test images of each task.

    They are few, so that the matrix can come with every sum: for K tasks they cost 1 + 2K forward
    passes. The analysis "interference" measures it on all images.
    """
    splits = {task: split_of(run, base, task) for task in vectors}
    for task, split in splits.items():
        if (split.num_images or 0) > IMAGES:
            splits[task] = split_of(run.with_(sample=IMAGES), base, task)
    return matrix(base, {task: tau.vector for task, tau in vectors.items()}, splits)


def addition_table(results: dict[str, Any], tasks: Sequence[str], mode: str) -> str:
    """Zero-shot and sum, absolute and normalised; a dash where no normalised accuracy exists."""
    rows = {}
    for label, key in (("zero-shot", "zeroshot"), (f"sum, {mode}", "test")):
        mains = [f"{task}:{main_metric(results[key], task)}" for task in tasks]
        normalised = [main.replace(":", ":normalized_") for main in mains]
        for kind, names in (("absolute", mains), ("normalised", normalised)):
            rows[f"{label}, {kind}"] = [results[key].get(name) for name in names]
    return accuracy_table(tasks, rows)


def exact_line(exact: Mapping[str, Any]) -> str:
    """The exact optimum, see `arithmetic.addition.exact_optimum`, in a sentence."""
    low, high = ("unbounded" if end is None else f"{end:.4f}" for end in exact["plateau"])
    return (
        f"exact optimum on validation: coefficient {exact['coefficient']:.4f}, plateau {low} to "
        f"{high}, normalised {percent(exact['value'])}; there on test, mean: "
        f"{percent(exact['test'].get('avg_top1'))}"
    )


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
        if "interference" in results:
            told = means(results["interference"])
            print(f"interference, on at most {IMAGES} test images of each task: {told}")
        print(f"at coefficient 1: {percent(results['test_at_1'].get('avg_top1'))} on test, mean")
        if "exact" in results:
            print(exact_line(results["exact"]))
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
