"""Learning rates and seeds: how they change task vectors, their sums and their negations.

    python scripts/study_rates.py --seeds=0,1,2 --modes=standard,linear
    python scripts/study_rates.py --tasks=MNIST,Signs --seeds=0,1 --factors=0.1,1,10 --sample=200

Fine-tunes every task at the suite's rate times each of `--factors`, two decades by default, for
each seed (checkpoints that exist are used), with snapshots along the way. A row a mode, rate and
seed has the mean test accuracies of the single tasks, of the sum of all vectors at the coefficient
chosen on validation, and of the negations that keep the control set; and the mean over tasks of the
vectors' norm, of their cosine with those of the first of the seeds, and of the first snapshot's
cosine with the end. A row whose fine-tuning diverges says so.

Writes rates_MODEL.json and .md, with the tasks where they are not the suite's and the sample in the
name, beside the runs' results; and two figures, of the accuracies against the rate (.png, .svg,
.pdf) and of the cosines along fine-tuning (_along). Rows that the file has of other modes, rates
and seeds are kept, and those whose checkpoints are the same are not measured again: an interrupted
study is continued by the same command, and seeds can be added one by one. All must have the same
other flags, which are those of src/finetune.py and of the evaluation.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tangent_arithmetic.analysis import rates
from tangent_arithmetic.analysis.figures import write
from tangent_arithmetic.analysis.tables import other_settings
from tangent_arithmetic.arithmetic.coefficients import coefficients, largest, least_kept
from tangent_arithmetic.arithmetic.metrics import learned
from tangent_arithmetic.arithmetic.negation import negate
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.commands.finetune import finetune
from tangent_arithmetic.commands.paper import caption
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.run.args import LARGEST_SEED, Parser, parse_arguments
from tangent_arithmetic.run.models import (
    base_encoder,
    checkpoint_hashes,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.modes import in_order
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import spread
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.run.usage import TRAINING
from tangent_arithmetic.runtime.atomic import check_writable, write_json, write_text
from tangent_arithmetic.runtime.errors import DivergedError, UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.ranges import several
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.storage.statedict import State, dot, norm

logger = logging.getLogger(__name__)
Row = dict[str, Any]

SNAPSHOTS = 4  # of each run, at equal distances
PERCENT = ("single", "sum", "target", "control")
OWN = {"finetuning_mode": "modes", "seed": "seeds", "save": "folder", "lr": "factors"}
# flags that decide numbers, beside those of the file's name and of a row
SETTINGS = {*TRAINING, "precision", "head", "template", "control_dataset", "control_threshold",
            "n_eval_points"} - {"lr"}  # fmt: skip
COLUMNS = (*PERCENT, "coefficient", "norm", "cosine with the first seed", "early cosine")


def output_of(run: Run) -> Path:
    """The file of the rows; another model, other tasks or a sample have one of their own."""
    tasks = "" if run.tasks == list(run.suite.tasks) else f"_{'+'.join(run.tasks)}"
    return run.results.with_name(f"rates_{run.results.name}{tasks}.json")


def rows_of(output: Path, run: Run) -> list[Row]:
    """The rows that the file has; none if it does not exist.

    Raises:
        UsageError: if they were made with other flags, since means over seeds would mix them.
    """
    rows = list(read_json(output)["rows"]) if output.is_file() else []
    made = [row["provenance"]["config"] for row in rows]
    if differ := sorted({flag for one in made for flag in other_settings(run, one, SETTINGS)}):
        raise UsageError(
            f"{output} has rows that were made with another {', '.join(differ)}. Set the same, "
            "delete it, or name another folder with --results"
        )
    return rows


def key(row: Mapping[str, Any]) -> tuple[str, float, int]:
    """The mode, factor and seed, which a file has one row of."""
    return row["mode"], row["factor"], row["seed"]


def added(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with one more, in place of an earlier one of its `key`; by mode, rate and seed."""
    rows = [*(one for one in rows if key(one) != key(row)), row]
    modes = in_order(one["mode"] for one in rows)
    return sorted(rows, key=lambda one: (modes.index(one["mode"]), one["factor"], one["seed"]))


def trained(run: Run, task: str) -> None:
    """Fine-tunes a task, with a snapshot at each quarter of its steps."""
    recipe = run.recipe(task)
    images = len(run.data.dataset(f"{task}Val").train)
    step = recipe.batch_size * recipe.num_grad_accumulation
    steps = recipe.steps(-(-images // step))
    finetune(run.with_(checkpoint_every=-(-steps // SNAPSHOTS)), task)


def vectors_of(run: Run, start: tuple[ModuleEncoder, str]) -> dict[str, TaskVector]:
    """The task vectors of a run."""
    return {task: task_vector(run, task, run.mode.name, *start) for task in run.tasks}


def cosine(one: State, other: State) -> float:
    """The cosine of two vectors."""
    return float(dot(one, other) / (norm(one) * norm(other)))


def early(run: Run, task: str, encoder: ModuleEncoder, end: State) -> dict[str, float]:
    """The cosine of each snapshot's vector with the end's, by its step; the end has 1."""
    path, mode = run.finetuned_path(task, run.mode.name), run.mode
    snapshots = path.parent.glob(f"{mode.prefix}checkpoint_*.safetensors")
    by_step = sorted((int(one.stem.rpartition("_")[2]), one) for one in snapshots)
    cosines = {s: cosine(mode.task_vector(encoder, one).vector, end) for s, one in by_step}
    return {str(step): c for step, c in {**cosines, read_facts(path)["info"]["steps"]: 1.0}.items()}


def evaluated(run: Run, taus: Mapping[str, TaskVector], encoder: ModuleEncoder) -> dict[str, float]:
    """Mean test accuracies of single tasks, of the sum and of negations; chosen on validation."""
    base, coefs = base_encoder(encoder, run.mode.name), coefficients(run.config.n_eval_points)

    def split(name: str) -> Split:
        return split_of(run, base, name)

    alone = {t: split(t).sweep(base, tau.vector, [1.0])[0] for t, tau in taus.items()}
    total = functools.reduce(operator.add, taus.values()).vector
    singles = {t: split(f"{t}Val").sweep(base, tau.vector, [1.0])[0] for t, tau in taus.items()}
    on_val = [
        np.array(split(f"{t}Val").sweep(base, total, coefs)) / singles[t]
        for t in learned(taus, singles)
    ]
    means = np.mean(on_val, axis=0) if on_val else np.zeros(len(coefs))
    best = largest(dict(zip(coefs, means.tolist(), strict=True)))[0]
    found = {
        "single": float(np.mean(list(alone.values()))),
        "sum": float(np.mean([split(t).sweep(base, total, [best])[0] for t in taus])),
        "coefficient": best,
    }
    control = run.control
    kept = split(f"{control}Val").sweep(base, total, [0.0])[0]
    least = least_kept(run.config.control_threshold, kept)
    negated = [
        negate(base, tau.vector, (split(f"{t}Val"), split(f"{control}Val")),
               (split(t), split(control)), least, coefs)
        for t, tau in taus.items()
    ]  # fmt: skip
    for name, key in (("target", "test"), ("control", "test_control")):
        found[name] = float(np.mean([one[key] for one in negated]))
    return found


def record(run: Run, factor: float, first: Run | None, old: Row | None) -> Row:
    """The row of one mode, rate and seed.

    Args:
        run: the run.
        factor: its rate, in those of the suite.
        first: the run of the first of the seeds; None if it is this one.
        old: the row that the file has, kept if it is of the same checkpoints.
    """
    begin, row = time.monotonic(), {"mode": run.mode.name, "factor": factor, "seed": run.seed}
    try:
        for task in run.tasks:
            trained(run, task)
    except DivergedError as error:
        logger.warning("%s, rate x %g, seed %d: %s", *row.values(), error)
        row["diverged"] = str(error)
        return {**row, "provenance": provenance(run, time.monotonic() - begin)}
    seconds = time.monotonic() - begin
    row["checkpoints"] = checkpoint_hashes(run, run.tasks, run.mode.name)
    row["first"] = first and checkpoint_hashes(first, first.tasks, first.mode.name)
    if old is not None and all(old.get(name) == row[name] for name in ("checkpoints", "first")):
        logger.info("%s, rate x %g, seed %d: measured before, skipped", *key(row))
        return old
    start = zeroshot_encoder(run)
    taus = vectors_of(run, start)
    along = {t: early(run, t, start[0], tau.vector) for t, tau in taus.items()}
    firsts = [value for steps in along.values() for value in list(steps.values())[:-1][:1]]
    row |= {
        **evaluated(run, taus, start[0]),
        "norm": float(np.mean([float(norm(tau.vector)) for tau in taus.values()])),
        "early cosine": float(np.mean(firsts)) if firsts else None,
        "along": along,
        "training seconds": seconds,
        "cosine with the first seed": None,
    }
    if first is not None:
        others = vectors_of(first, start)
        row["cosine with the first seed"] = float(
            np.mean([cosine(tau.vector, others[t].vector) for t, tau in taus.items()])
        )
    return {**row, "provenance": provenance(run, time.monotonic() - begin)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over the seeds of each mode and rate, in Markdown."""
    groups = dict[tuple[str, float], list[Mapping[str, Any]]]()
    for row in rows:
        groups.setdefault((row["mode"], row["factor"]), []).append(row)
    lines = []
    for (mode, factor), group in groups.items():
        values = ([row[c] for row in group if row.get(c) is not None] for c in COLUMNS)
        cells = [cell(own, c) for own, c in zip(values, COLUMNS, strict=True)]
        diverged = sum("diverged" in row for row in group)
        counts = [str(len(group) - diverged), str(diverged)]
        lines.append([f"{mode}, rate x {factor:g}", *counts, *cells])
    return markdown_table(["", "seeds", "diverged", *COLUMNS], lines)


def cell(values: Sequence[float], column: str) -> str:
    """Mean and standard deviation, in percent for accuracies."""
    return spread(values, *((100, 1) if column in PERCENT else (1, 2)))


def write_all(output: Path, run: Run, rows: Sequence[Row]) -> None:
    """Writes the rows, their table and the figures."""
    write_json(output, {"model": run.model, "tasks": run.tasks, "sample": run.config.sample,
                        "rows": rows})  # fmt: skip
    seeds = [run.with_(seed=seed) for seed in sorted({row["seed"] for row in rows})]
    runs, *errors = caption(run, seeds)
    told = "\n".join([runs, *errors])
    of = f"{run.model} on {', '.join(run.tasks)}{run.examples}"
    write_text(output.with_suffix(".md"), f"{of}\n\n{table(rows)}\n\n{told}\n")
    place: dict[str, Any] = {"folder": output.parent, "style": run.config.style}
    write(rates.draw, rows, run, stem=output.stem, note=told, **place)
    write(rates.draw_along, rows, stem=f"{output.stem}_along", note=runs, **place)  # no images


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, evaluates, and writes the rows after each of them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--modes", default="standard,linear", help="modes, MODE,...")
    text = "rates, in those of the suite, N,..."
    parser.add_argument("--factors", type=several(float, 1e-6, 1e6), default="0.1,0.3,1,3,10",
                        help=text)  # fmt: skip
    parser.add_argument("--seeds", type=several(int, 0, LARGEST_SEED), default="0,1,2",
                        help="seeds, N,...")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/rates"))
    own, flags = parser.parse_known_args(argv)
    setup_logging()
    start = Run.of(parse_arguments(flags))
    for flag, instead in OWN.items():
        if getattr(start.config, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} is set by --{instead} here; leave it out")
    start.data.dataset(start.control)  # an error before the training
    output = output_of(start)
    check_writable(output)
    rows_of(output, start)

    def run_of(mode: str, factor: float, seed: int) -> Run:
        run = Run.of(parse_arguments([*flags, f"--finetuning-mode={mode}", f"--seed={seed}"]))
        rate = factor * run.recipe(run.tasks[0]).lr
        return run.with_(lr=rate, save=str(own.folder / f"seed{seed}" / f"{mode}_{factor:g}"))

    points = itertools.product(own.modes.split(","), own.factors)
    for factor, runs in [(f, [run_of(mode, f, s) for s in own.seeds]) for mode, f in points]:
        first = None
        for run in runs:
            olds = {key(row): row for row in rows_of(output, start)}
            row = record(run, factor, first, olds.get((run.mode.name, factor, run.seed)))
            first = first or (run if "checkpoints" in row else None)
            rows = added(rows_of(output, start), row)
            write_all(output, start, rows)
            print(table(rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
