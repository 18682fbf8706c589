"""The sum of all task vectors with solved coefficients: its accuracies, its checkpoint, a table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tangent_arithmetic import __version__
from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.solving.combining import (
    Combination,
    Settings,
    accuracies,
    best_uniform,
    combine_linear,
    combine_standard,
    placed,
    reductions,
)
from tangent_arithmetic.arithmetic.solving.groups import along
from tangent_arithmetic.arithmetic.solving.merged import Merged
from tangent_arithmetic.arithmetic.solving.shots import few
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.commands.combining.flags import named, parts_of, shots_of, slug
from tangent_arithmetic.encoders.base import ModuleEncoder, is_linear
from tangent_arithmetic.run.heads import evaluated_on
from tangent_arithmetic.run.models import (
    base_encoder,
    checkpoint_hashes,
    split_of,
    zeroshot_encoder,
)
from tangent_arithmetic.run.present import superseded
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import accuracies_path, optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import accuracy_table
from tangent_arithmetic.storage.statedict import State

METHOD = "solved_coefficients"
Results = dict[str, Any]


def combination(run: Run, settings: Settings) -> tuple[Results, ModuleEncoder]:
    """The solved sum of all task vectors, with provenance, and the model at it.

    Accuracies are of the test splits; "uniform" is the coefficient for all directions with the best
    mean accuracy on the validation pictures that the others are solved on.
    """
    begin, tasks, mode = time.monotonic(), run.tasks, run.mode.name
    encoder, theta0_hash = zeroshot_encoder(run)
    parts = parts_of(run, encoder, theta0_hash, tasks)
    base, vectors = base_encoder(encoder, mode), [part.vector for part in parts]
    shots, ones = shots_of(run.config), np.ones(len(parts))
    val = [few(split_of(run, base, f"{task}Val"), shots, run.seed) for task in tasks]
    grid = coefficients(run.config.n_eval_points)
    uniform = best_uniform(base, along(vectors, ones), val, grid)
    solved, seconds = _solved(base, vectors, val, uniform, settings)
    points = {"zeroshot": 0 * ones, "uniform": uniform * ones, "solved": solved.coefficients}
    test = [split_of(run, base, task) for task in tasks]
    found = accuracies(base, vectors, points | solved.others, test)
    names = [f"{task}{end}" for task in tasks for end in ("Val", "")]
    results = {
        "coefficients": named(parts, solved.coefficients),
        "uniform": uniform,
        "test": found,
        "solved_on": _solved_on(val, shots, settings),
        "solver": {**solved.facts, "start": solved.uniform, "solve_seconds": round(seconds, 2)},
        "others": {name: named(parts, a) for name, a in solved.others.items()},
        "provenance": provenance(
            run,
            time.monotonic() - begin,
            theta0_hash=theta0_hash,
            checkpoints=checkpoint_hashes(run, tasks, mode),
            **evaluated_on(run, names),
        ),
    }
    placed(base, along(vectors, solved.coefficients))
    return results, base


def _solved_on(val: Sequence[Split], shots: int | None, settings: Settings) -> Results:
    return {
        "split": "validation",
        "labels": settings.rule is None,
        "shots": shots,
        "images": {split.name: split.num_images for split in val},
    }


def _solved(
    base: ModuleEncoder,
    vectors: Sequence[State],
    val: Sequence[Split],
    uniform: float,
    settings: Settings,
) -> tuple[Combination, float]:
    """Solved coefficients, and the seconds that it took after the pass over the pictures."""
    if is_linear(base):
        splits = reductions(base, vectors, val, settings.folder)
        begin = time.monotonic()
        return combine_linear(splits, uniform, settings), time.monotonic() - begin
    begin, model = time.monotonic(), Merged(base, vectors, val, settings.folder)
    try:
        return combine_standard(model, uniform, settings), time.monotonic() - begin
    finally:
        model.place(np.zeros(len(vectors)))


def checkpoint_path(run: Run) -> Path:
    """The file of the merged model."""
    return run.folder / f"{run.mode.prefix}combined_{slug(run)}.safetensors"


def save(run: Run, model: ModuleEncoder, results: Results) -> Path:
    """Writes the merged model as a checkpoint, with the recipe of a merge."""
    origin, path = results["provenance"], checkpoint_path(run)
    recipe = {
        "method": METHOD,
        "options": {"grouping": run.config.coefficients, "coefficients": results["coefficients"]},
        "models": origin["checkpoints"],
        "version": __version__,
    }
    model.save(path, theta0_hash=origin["theta0_hash"], merge_recipe=recipe)
    return path


def combination_table(run: Run, results: Results) -> str:
    """Zero-shot, the best uniform coefficient, solved ones, and each single task's model."""
    labels = {"zeroshot": "zero-shot", "uniform": f"uniform, {results['uniform']:g}"}
    labels["solved"] = f"solved, {len(results['coefficients'])} coefficients"
    single = optional_results(accuracies_path(run, run.mode.name))
    if superseded(run.results, results["provenance"], run.mode.name):
        single = {}
    rows = {
        labels.get(name, name): [values[task] for task in run.tasks]
        for name, values in results["test"].items()
    }
    singles = [single.get(task) for task in run.tasks]
    return accuracy_table(run.tasks, rows | ({"single tasks": singles} if any(singles) else {}))


def account(results: Results) -> str:
    """What the coefficients were solved on, and how."""
    on, solver = results["solved_on"], results["solver"]
    count = sum(n or 0 for n in on["images"].values())
    labels = "labelled" if on["labels"] else "unlabelled"
    how = ", ".join(
        f"{name} {value}" for name, value in solver.items() if name in ("ridge", "rule", "solver")
    )
    return f"solved on {count} {labels} validation pictures ({how}); accuracies are of test splits"
