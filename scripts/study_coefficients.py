"""Solved coefficients on the embedded suite; writes results/embedded/coefficients.{json,md}.

    python scripts/study_coefficients.py --seeds=3
    python scripts/study_coefficients.py --time  # of a solve: 48 coefficients, 8 x 5,000 pictures

For each fine-tuning seed and mode: the best coefficient for all on validation, solved ones by task,
layer and task-layer on all validation pictures, and by task-layer on a few a class; standard models
by Gauss-Newton (at most four passes) and by the quasi-Newton method; negation of linear vectors by
layer. Accuracies are of the test splits. Checkpoints of all modes must exist (`finetune`), those of
a seed in the folder that `--seed` picks. The figure shows task-layer coefficients of the first one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import heat, panels, plain, save
from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.solving.combining import (
    Settings,
    accuracies,
    best_uniform,
    combine_linear,
    combine_standard,
    reductions,
)
from tangent_arithmetic.arithmetic.solving.groups import Direction, along, directions
from tangent_arithmetic.arithmetic.solving.merged import Merged
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.shots import shot_indices
from tangent_arithmetic.arithmetic.solving.solver import Objective, solve
from tangent_arithmetic.arithmetic.solving.standard import Solver, supervised
from tangent_arithmetic.commands.combine import negations, settings_of
from tangent_arithmetic.data.suites import EMBEDDED_MODEL
from tangent_arithmetic.encoders.base import Encoder, is_linear
from tangent_arithmetic.run.args import Config, Parser
from tangent_arithmetic.run.models import base_encoder, split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.modes import get_mode
from tangent_arithmetic.run.results import git_commit, markdown_table, versions
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.ranges import number

SHOTS = (1, 4, 16)
Row = dict[str, Any]  # "mean" test accuracy, "coefficients" by name, "facts"
Points = dict[str, tuple[np.ndarray, Row]]


def sums(parts: Sequence[Direction], by: str) -> np.ndarray:
    """Which task-layer directions each task, or each layer, is the sum of."""
    keys = [getattr(part, by) for part in parts]
    return np.array([[float(key == group) for group in dict.fromkeys(keys)] for key in keys])


def linear(splits: list[Reduced], parts: Sequence[Direction], uniform: float, seed: int) -> Points:
    """Solved points of a linear model: coefficients of the task-layer directions, and facts."""
    settings, found = Settings(seed=seed), Points()
    for name, groups in (
        ("task", sums(parts, "task")),
        ("layer", sums(parts, "group")),
        ("task-layer", np.eye(len(parts))),
    ):
        begin = time.monotonic()
        solved = combine_linear([s.along(groups) for s in splits], uniform, settings)
        facts = {**solved.facts, "seconds": round(time.monotonic() - begin, 2)}
        found[name] = groups @ solved.coefficients, facts
    for shots in SHOTS:
        few = [s.take(shot_indices(s.labels, shots, seed)) for s in splits]
        grid = coefficients(21)
        ones = np.ones(len(parts))
        means = [np.mean([s.accuracy(c * ones) for s in few]) for c in grid]
        best = grid[int(np.argmax(means))]
        found[f"uniform, {shots} a class"] = best * ones, {"uniform": best}
        solved = combine_linear(few, best, settings)
        facts = {**solved.facts, "images": sum(map(len, few))}
        found[f"task-layer, {shots} a class"] = solved.coefficients, facts
    return found


def standard(model: Merged, count: int, uniform: float, seed: int) -> Points:
    """Solved points of a standard model."""
    found = Points()
    solvers: tuple[Solver, ...] = ("gauss-newton", "quasi-newton")
    for solver in solvers:
        model.place(np.zeros(count))
        model.units, begin = 0.0, time.monotonic()
        solved = combine_standard(model, uniform, Settings(seed=seed, solver=solver))
        facts = {**solved.facts, "seconds": round(time.monotonic() - begin, 1)}
        found[f"task-layer, {solver}"] = solved.coefficients, facts
    return found


def study(run: Run, mode: str) -> dict[str, Row]:
    """The rows of a mode and a seed."""
    encoder, theta0_hash = zeroshot_encoder(run)
    taus = {t: task_vector(run, t, mode, encoder, theta0_hash).vector for t in run.tasks}
    parts = directions(taus, "task-layer", list(encoder.weights()))
    vectors, base = [part.vector for part in parts], base_encoder(encoder, mode)
    val = [split_of(run, base, f"{task}Val") for task in run.tasks]
    test = [split_of(run, base, task) for task in run.tasks]
    ones = np.ones(len(parts))
    uniform = best_uniform(base, along(vectors, ones), val, coefficients(21))
    points: Points = {
        "zero-shot": (0 * ones, {}),
        "uniform": (uniform * ones, {"uniform": uniform}),
    }
    if is_linear(base):
        points |= linear(reductions(base, vectors, val, None), parts, uniform, run.seed)
    else:
        model = Merged(base, vectors, val)
        points |= standard(model, len(parts), uniform, run.seed)
        model.place(0 * ones)
    return _rows(base, parts, points, test)


def _rows(base: Encoder, parts: Sequence[Direction], points: Points, test: Sequence[Any]
) -> dict[str, Row]:  # fmt: skip
    found = accuracies(
        base, [p.vector for p in parts], {n: a for n, (a, _) in points.items()}, test
    )
    names = [part.name for part in parts]
    return {
        name: {
            "mean": float(np.mean(list(found[name].values()))),
            "test": found[name],
            "coefficients": dict(zip(names, map(float, a), strict=True)),
            "facts": facts,
        }
        for name, (a, facts) in points.items()
    }


def negation(run: Run) -> dict[str, Row]:
    """Means over tasks of the negation by layer: accuracy on the task, and on the control set."""
    results = negations(run, settings_of(run))
    return {
        f"negation, {label}": {
            "mean": float(np.mean([results[t]["test"][kind][t] for t in run.tasks])),
            "control": float(np.mean([results[t]["test"][kind][run.control] for t in run.tasks])),
            "test": {t: results[t]["test"][kind][t] for t in run.tasks},
        }
        for kind, label in (("uniform", "one"), ("solved", "by layer"))
    }


def table(results: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> str:
    """A row a mode and a kind of coefficients; mean and standard deviation over seeds."""
    rows = []
    first = next(iter(results.values()))
    for mode, kinds in first.items():
        for kind in kinds:
            own = [seed[mode][kind] for seed in results.values() if kind in seed.get(mode, {})]
            control = [row["control"] for row in own if "control" in row]
            rows.append([mode, kind, spread([row["mean"] for row in own]), spread(control)])
    return markdown_table(["mode", "coefficients", "test, %", "control, %"], rows)


def spread(values: Sequence[float]) -> str:
    """The mean in percent, and the standard deviation of several values."""
    if not values:
        return "-"
    scaled = 100 * np.asarray(values)
    return f"{scaled.mean():.1f}" + (f" ± {scaled.std(ddof=1):.1f}" if len(values) > 1 else "")


def draw(rows: Mapping[str, Mapping[str, Row]]) -> Any:
    """The task-layer coefficients of each mode."""
    kinds = {mode: next(k for k in own if k.startswith("task-layer")) for mode, own in rows.items()}
    figure, axes = panels(1, len(kinds), width=5.0, height=3.6)
    for axis, (mode, kind) in zip(axes[0], kinds.items(), strict=True):
        values = pd.Series(rows[mode][kind]["coefficients"])
        values.index = pd.MultiIndex.from_tuples(
            [tuple(name.split("/", 1)) for name in values.index]
        )
        square = values.unstack()[list(dict.fromkeys(values.index.get_level_values(1)))]
        limit = float(np.abs(values).max())
        image = heat(axis, square, (-limit, limit), palette.SIGNED, written=True)
        axis.set_title(f"{get_mode(mode).label}: coefficient of each task and layer")
        figure.colorbar(image, ax=axis)
    return figure


def timed(images: int = 5000, count: int = 48, classes: int = 10) -> str:
    """The seconds of a solve for `count` coefficients on 8 tasks of random images."""
    torch.manual_seed(0)
    splits = []
    for task in range(8):
        weight, labels = 3 * torch.randn(classes, 64), torch.randint(classes, (images,))
        features = torch.randn(1 + count, images, 64)
        features += torch.randn(1 + count, 1, 1) * 0.1 * weight[labels]
        root = torch.linalg.qr(features.permute(1, 2, 0), mode="r").R.contiguous()
        base, *steps = features @ weight.T
        splits.append(Reduced(str(task), base, torch.stack(steps), root, labels))
    objective = Objective(supervised(splits), np.full(count, 0.3), 0.1)
    begin = time.monotonic()
    found = solve(objective, objective.centre)
    return f"{time.monotonic() - begin:.2f} s, {found.facts()}"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=number(int, 1, 10_000), default=1, help="seeds, from 0")
    parser.add_argument("--modes", default="linear,standard", help="comma list of modes")
    parser.add_argument("--sample", type=number(int, 1, 10**9), help="pictures of each split")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results' root")
    parser.add_argument("--time", action="store_true", help="measure a solve on random images")
    args = parser.parse_args(argv)
    setup_logging()
    if args.time:
        print(timed())
        return 0
    begun, results = time.monotonic(), dict[str, dict[str, dict[str, Row]]]()
    folder, text = args.results / "embedded", ""
    for seed in range(args.seeds):
        found = results.setdefault(str(seed), {})
        for mode in args.modes.split(","):
            config = Config(model=EMBEDDED_MODEL, seed=seed or None, finetuning_mode=mode)
            config.sample, config.coefficients = args.sample, "layer"
            run = Run.of(config)
            found[mode] = study(run, mode)
            if run.mode.linear:
                found[mode] |= negation(run.with_(negate=True))
            facts: Row = {"commit": git_commit(), "versions": versions(), "sample": args.sample}
            facts["seconds"] = round(time.monotonic() - begun, 1)
            write_json(folder / "coefficients.json", {"provenance": facts, "seeds": results})
        text = table(results)
        write_text(
            folder / "coefficients.md",
            "# Solved coefficients on the embedded suite\n\n"
            f"`python scripts/study_coefficients.py --seeds={len(results)}`: mean test accuracy of "
            "the eight tasks; mean and standard deviation over fine-tuning seeds. All is chosen on "
            "validation, or on a few of its pictures a class. For negation the accuracy on the "
            f"negated task, and on the control set.\n\n{text}\n",
        )
    save(plain(draw, results["0"]), folder / "figures", "coefficients", "seed 0")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
