"""Solves for the coefficients of task vectors, by task, layer or tensor.

Coefficients are solved on validation pictures, accuracies are of the test splits. Writes a results
file, and the merged model as a checkpoint. See docs/solving.md.
"""

from __future__ import annotations

import re
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
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
from tangent_arithmetic.arithmetic.solving.groups import (
    Direction,
    along,
    check_grouping,
    directions,
)
from tangent_arithmetic.arithmetic.solving.merged import Merged
from tangent_arithmetic.arithmetic.solving.negation import Forgetting, forget
from tangent_arithmetic.arithmetic.solving.shots import few
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import ModuleEncoder, is_linear
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.config import Config
from tangent_arithmetic.run.models import (
    announce,
    base_encoder,
    checkpoint_hashes,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.results import (
    accuracies_path,
    accuracy_table,
    check_targets,
    markdown_table,
    optional_results,
    percent,
    provenance,
    write_results,
)
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.storage.statedict import State

METHOD = "solved_coefficients"
Results = dict[str, Any]


def shots_of(config: Config) -> int | None:
    """`--shots` of this command, labelled pictures a class; None for all.

    Raises:
        UsageError: if it is not one number.
    """
    if config.shots == Config().shots:  # the analyses' default
        return None
    if len(config.shots) != 1:
        raise UsageError(f"--shots: expected one number of pictures a class, got {config.shots}")
    return int(config.shots[0])


def settings_of(run: Run) -> Settings:
    """How the run solves for coefficients.

    Raises:
        UsageError: for flags that make no sense together.
    """
    config = run.config
    bounds = None
    if config.coefficient_bounds is not None:
        try:
            low, high = map(float, config.coefficient_bounds)
        except ValueError:
            low, high = 1.0, 0.0
        if not low <= high:
            raise UsageError(
                "--coefficient-bounds: expected the least and the largest coefficient, such as "
                f"0,1, got {','.join(config.coefficient_bounds)}"
            )
        bounds = (low, high)
    if config.unlabelled is not None and (config.negate or shots_of(config) is not None):
        raise UsageError("--unlabelled uses no labels; leave out --shots and --negate")
    if config.negate and not run.mode.linear:
        raise UsageError(
            "--negate solves for coefficients of linear models; choose --finetuning-mode=linear or "
            "--finetuning-mode=posthoc"
        )
    solver = None if config.solver == "auto" else config.solver
    return Settings(config.ridge, bounds, config.unlabelled, solver=solver, seed=run.seed)


def slug(run: Run) -> str:
    """The run's part of the names of its files: the grouping, and what differs from the default."""
    name = run.config.coefficients
    plain = re.sub(r"\W+", "-", name)[:40].strip("-")
    parts = [name if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"]
    shots = shots_of(run.config)
    parts += [f"{shots}shot"] if shots is not None else []
    parts += [run.config.unlabelled] if run.config.unlabelled else []
    return "_".join(parts)


def _parts(run: Run, encoder: ModuleEncoder, theta0_hash: str, tasks: Sequence[str]
) -> list[Direction]:  # fmt: skip
    """The directions of some tasks' vectors."""
    mode = run.mode.name
    taus = {task: task_vector(run, task, mode, encoder, theta0_hash).vector for task in tasks}
    return directions(taus, run.config.coefficients, list(encoder.weights()))


def combination(run: Run, settings: Settings) -> tuple[Results, ModuleEncoder]:
    """The solved sum of all task vectors, with provenance, and the model at it.

    Accuracies are of the test splits; "uniform" is the coefficient for all directions with the best
    mean accuracy on the validation pictures that the others are solved on.
    """
    begin, tasks, mode = time.monotonic(), run.tasks, run.mode.name
    encoder, theta0_hash = zeroshot_encoder(run)
    parts = _parts(run, encoder, theta0_hash, tasks)
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
        "coefficients": _named(parts, solved.coefficients),
        "uniform": uniform,
        "test": found,
        "solved_on": {
            "split": "validation",
            "labels": settings.rule is None,
            "shots": shots,
            "images": {split.name: split.num_images for split in val},
        },
        "solver": {**solved.facts, "start": solved.uniform, "solve_seconds": round(seconds, 2)},
        "others": {name: _named(parts, a) for name, a in solved.others.items()},
        "provenance": provenance(
            run,
            time.monotonic() - begin,
            theta0_hash=theta0_hash,
            checkpoints=checkpoint_hashes(run, tasks, mode),
            splits=run.data.split_hashes(names),
        ),
    }
    placed(base, along(vectors, solved.coefficients))
    return results, base


def _named(parts: Sequence[Direction], a: np.ndarray) -> dict[str, float]:
    return {part.name: float(c) for part, c in zip(parts, a, strict=True)}


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


def negations(run: Run, settings: Settings) -> Results:
    """Every task's negation with solved coefficients, and the front, with provenance.

    Coefficients are solved and chosen on validation pictures of the task and the control set.
    """
    begin, mode, control = time.monotonic(), run.mode.name, run.control
    encoder, theta0_hash = zeroshot_encoder(run)
    base, shots = base_encoder(encoder, mode), shots_of(run.config)
    assert is_linear(base)
    results: Results = {}
    for task in run.tasks:
        parts = _parts(run, encoder, theta0_hash, [task])
        vectors = [part.vector for part in parts]
        val = [few(split_of(run, base, f"{task}Val"), shots, run.seed)]
        val.append(split_of(run, base, f"{control}Val"))
        forgotten, kept = reductions(base, vectors, val, settings.folder)
        front = forget(forgotten, kept, run.config.control_threshold, bounds=settings.bounds)
        test = [split_of(run, base, name) for name in (task, control)]
        points = {"zeroshot": np.zeros(len(parts))}
        points |= {"uniform": front.best(one=True).coefficients}
        points |= {"solved": front.best().coefficients}
        results[task] = {
            "coefficients": _named(parts, points["solved"]),
            "uniform": float(-points["uniform"][0]),
            "test": accuracies(base, vectors, points, test),
            "val": {"solved": _point(front.best()), "uniform": _point(front.best(one=True))},
            "least_control": front.least,
            "front": [_point(point) for point in front.frontier()],
        }
    results["provenance"] = provenance(
        run,
        time.monotonic() - begin,
        theta0_hash=theta0_hash,
        checkpoints=checkpoint_hashes(run, run.tasks, mode),
    )
    return results


def _point(point: Forgetting) -> dict[str, Any]:
    return {
        "task": point.task,
        "control": point.control,
        "weight": point.weight,
        "factor": point.factor,
    }


def combination_table(run: Run, results: Results) -> str:
    """Zero-shot, the best uniform coefficient, solved ones, and each single task's model."""
    labels = {"zeroshot": "zero-shot", "uniform": f"uniform, {results['uniform']:g}"}
    labels["solved"] = f"solved, {len(results['coefficients'])} coefficients"
    single = optional_results(accuracies_path(run, run.mode.name))
    rows = {
        labels.get(name, name): [values[task] for task in run.tasks]
        for name, values in results["test"].items()
    }
    singles = [single.get(task) for task in run.tasks]
    return accuracy_table(run.tasks, rows | ({"single tasks": singles} if any(singles) else {}))


def negation_table(run: Run, results: Results) -> str:
    """Each task and the control set: zero-shot, one coefficient, solved ones."""
    kinds = ("zeroshot", "uniform", "solved")
    rows = [
        [results[task]["test"][kind][name] for kind in kinds for name in (task, run.control)]
        for task in run.tasks
    ]
    means = list(np.mean(rows, axis=0))
    header = [f"{kind}{end}" for kind in ("zero-shot", "one", "solved") for end in ("", " control")]
    cells = [[t, *map(percent, row)] for t, row in zip(run.tasks, rows, strict=True)]
    return markdown_table(["%", *header], [*cells, ["mean", *map(percent, means)]])


def work(run: Run) -> None:
    """Solves, evaluates, writes and prints."""
    announce(run, "combine")
    if ddp.world_size() > 1:
        raise UsageError("combine runs in one process; start it without torchrun")
    if not run.mode.linear:
        raise UsageError(
            f"combine solves for linear models, got --finetuning-mode={run.mode.name}; choose "
            "linear or posthoc"
        )
    settings = settings_of(run)
    check_grouping(run.config.coefficients)
    kind = "negated" if run.config.negate else "combined"
    path = run.results / f"{run.mode.prefix}{kind}_{slug(run)}.json"
    targets = [path] if run.config.negate else [path, checkpoint_path(run)]
    check_targets(run, *targets)
    with tempfile.TemporaryDirectory(dir=_scratch(run), ignore_cleanup_errors=True) as folder:
        settings = replace(settings, folder=Path(folder))
        if run.config.negate:
            results = negations(run, settings)
        else:
            results, model = combination(run, settings)
            results["checkpoint"] = str(save(run, model, results))
    write_results(path, results, run)
    if run.config.negate:
        print(negation_table(run, results))
    else:
        print(combination_table(run, results))
        print(_said(results))
    print(f"wrote {', '.join(map(str, targets))}")


def _scratch(run: Run) -> Path:
    run.cache.mkdir(parents=True, exist_ok=True)
    return run.cache


def _said(results: Results) -> str:
    """What the coefficients were solved on, and how."""
    on, solver = results["solved_on"], results["solver"]
    count = sum(n or 0 for n in on["images"].values())
    labels = "labelled" if on["labels"] else "unlabelled"
    how = ", ".join(
        f"{name} {value}" for name, value in solver.items() if name in ("ridge", "rule", "solver")
    )
    return f"solved on {count} {labels} validation pictures ({how}); accuracies are of test splits"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("combine", argv, __doc__)
    setup_logging()
    work(Run.of(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
