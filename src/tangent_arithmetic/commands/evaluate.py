"""Evaluates the pre-trained encoder, or each fine-tuned one, on its own task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tangent_arithmetic.arithmetic.metrics import beside, main_of
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.report.ahead import compute_ahead
from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.heads import evaluated_on
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import (
    announce,
    checkpoint_hashes,
    finetuned_encoder,
    split_of,
    zeroshot_encoder,
)
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import accuracies_path, check_targets, write_merged
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import accuracy_table
from tangent_arithmetic.run.tracking import tracked
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging


def single_task_accuracies(run: Run) -> dict[str, Any]:
    """The main metric of each task's encoder on the task's validation and test split.

    With provenance, and with the further metrics of each split, see `arithmetic.metrics.beside`.

    In mode "none" the pre-trained encoder is evaluated, on the control set too, if there is one.
    """
    mode, begin = run.mode, time.monotonic()
    base, theta0_hash = zeroshot_encoder(run)
    tasks = list(dict.fromkeys(name.removesuffix("Val") for name in run.eval_datasets))
    accuracies: dict[str, Any] = {}
    further: dict[str, float] = {}
    control = [] if mode.edits or run.control_set is None else [run.control_set]
    for task in dict.fromkeys([*tasks, *control]):
        encoder: Encoder = base
        if mode.edits:
            encoder = finetuned_encoder(run, task, mode.name, base, theta0_hash)
        for name in (f"{task}Val", task):
            found = split_of(run, encoder, name).accuracy(encoder)
            accuracies[name] = main_of(found)
            further |= beside(found, name)
    hashes = checkpoint_hashes(run, tasks, mode.name) if mode.edits else {}
    facts = {"theta0_hash": theta0_hash, "checkpoints": hashes, **evaluated_on(run, accuracies)}
    accuracies |= further
    accuracies["provenance"] = provenance(run, time.monotonic() - begin, **facts)
    return accuracies


def work(run: Run) -> None:
    """Evaluates, writes and prints, in every process of the run."""
    announce(run, "eval_single_task")
    mode = run.mode.name
    path = accuracies_path(run, mode)
    check_targets(run, path, report_path(run))
    with tracked(run, f"single-{mode}") as tracker:
        if run.config.ahead != "none":
            compute_ahead(run, page=run.config.ahead == "page")
        accuracies = single_task_accuracies(run)
        write_merged(path, accuracies, run)
        tracker.log({k: v for k, v in accuracies.items() if k != "provenance"})
        page = write_report(run)
        tracker.show("report", page)
    if ddp.is_main_process():
        tasks = list(dict.fromkeys(name.removesuffix("Val") for name in run.eval_datasets))
        label = "zero-shot" if mode == "none" else mode
        rows = {
            f"{label}, {split}": [accuracies[name + end] for name in tasks]
            for split, end in (("validation", "Val"), ("test", ""))
        }
        print(accuracy_table(tasks, rows | _balanced(accuracies, tasks, label)))
        if several := [name for name in tasks if f"{name}:map" in accuracies]:
            print(f"mean average precision, not accuracy: {', '.join(several)}")
        if mode == "none" and (control := run.control_set) is not None:
            print(f"control {control}: {100 * accuracies[control]:.1f} on test")
        print(f"wrote {path} and {page}")


def _balanced(accuracies: dict[str, Any], tasks: list[str], label: str) -> dict[str, list[Any]]:
    """A row of balanced accuracies, if one of them differs from the accuracy by half a percent."""
    values = [accuracies.get(f"{name}:balanced") for name in tasks]
    known = zip(tasks, values, strict=True)
    differ = any(v is not None and abs(v - accuracies[name]) >= 0.005 for name, v in known)
    return {f"{label}, test, balanced": values} if differ else {}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("evaluate", argv, __doc__)
    setup_logging()
    start(work, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
