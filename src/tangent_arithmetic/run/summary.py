"""The tables of a whole run, and of several seeds: mean and standard deviation."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tangent_arithmetic.run.latex import booktabs
from tangent_arithmetic.run.modes import MODES, in_order
from tangent_arithmetic.run.present import current_results, with_results
from tangent_arithmetic.run.results import (
    accuracies_path,
    arithmetic_path,
    optional_results,
    solved_path,
)
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table, mean, score
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.storage.reading import read_json

AT_ONE = "mean at 1"  # at coefficient 1
Results = dict[str, Any]
Picked = dict[str, float | None]
Picker = Callable[[Results, Sequence[str]], Picked]


def spread(values: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
    """The one value, or mean and standard deviation over seeds; a dash where one is not known.

    Args:
        values: one a seed.
        scale: what they are multiplied by, 100 for accuracies in percent.
        digits: decimal places.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    numbers = scale * np.asarray(known)
    shown = f"{numbers.mean():.{digits}f}"
    return shown if len(numbers) == 1 else f"{shown} ± {numbers.std(ddof=1):.{digits}f}"


def _numbers(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation and the values; None for what is not known."""
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "std": None, "values": list(values)}
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return {"mean": float(np.mean(known)), "std": deviation, "values": known}


def collect(runs: Sequence[Any]) -> dict[str, Any]:
    """The figures of one or more runs that differ in their seed.

    Args:
        runs: the settings of each run; what of their results is missing, damaged, or of earlier
            checkpoints than the single tasks is None.

    Returns:
        {"single": {mode: {data set: figures}}, "addition": {mode: {metric: figures}}, "solved":
        ..., "negation": ...}, where figures are {"mean", "std", "values"} over the runs. It has the
        modes with results in one of the runs, and zero-shot.
    """
    tasks, control = runs[0].tasks, runs[0].control_set
    modes = in_order(["none", *(name for run in runs for name in with_results(run.results))])
    edits = [mode for mode in modes if MODES[mode].edits]
    sums = [arithmetic_path(run, mode, "additions") for run in runs for mode in edits]
    at_one = any("test_at_1" in optional_results(path) for path in sums)

    def figures(mode: str, pick: Picker, path_of: Callable[..., Path], *which: str) -> Any:
        found = [pick(current_results(path_of(run, mode, *which), mode), tasks) for run in runs]
        return {key: _numbers([one[key] for one in found]) for key in found[0]}

    added, with_control = partial(_addition, at_one=at_one), partial(_single, control=control)
    singles = {mode: with_control if mode == "none" else _single for mode in modes}
    found = {
        "single": {m: figures(m, pick, accuracies_path) for m, pick in singles.items()},
        "addition": {m: figures(m, added, arithmetic_path, "additions") for m in edits},
        "solved": {m: figures(m, _solved, solved_path) for m in edits},
        "negation": {m: figures(m, _negation, arithmetic_path, "negations") for m in edits},
    }
    return {
        kind: {mode: one for mode, one in by_mode.items() if mode == "none" or _is_known(one)}
        for kind, by_mode in found.items()
    }


def _single(results: Results, tasks: Sequence[str], control: str | None = None) -> Picked:
    names = [*tasks, *([control] if control else [])]
    values = {name: results.get(name) for name in names}
    return {**values, "mean": mean([values[task] for task in tasks])}


def _addition(results: Results, tasks: Sequence[str], *, at_one: bool) -> Picked:
    zeroshot, test, whole = (results.get(key, {}) for key in ("zeroshot", "test", "test_at_1"))
    ones = {AT_ONE: "avg_top1", f"{AT_ONE} normalised": "avg_normalized_top1"} if at_one else {}
    return {
        "coefficient": results.get("coefficient"),
        "zero-shot": zeroshot.get("avg_top1"),
        "absolute": test.get("avg_top1"),
        "zero-shot normalised": zeroshot.get("avg_normalized_top1"),
        "normalised": test.get("avg_normalized_top1"),
        **{label: whole.get(key) for label, key in ones.items()},
        **{task: score(test, task) for task in tasks},
    }


def _solved(results: Results, tasks: Sequence[str]) -> Picked:
    test = results.get("test", {}).get("solved", {})
    values = {task: test.get(task) for task in tasks}
    return {"absolute": mean(list(values.values())), **values}


def _negation(results: Results, tasks: Sequence[str]) -> Picked:
    by_task = {task: results.get(task, {}) for task in tasks}
    names = {
        "zero-shot": "zeroshot",
        "target": "test",
        "zero-shot control": "zeroshot_control",
        "control": "test_control",
    }
    means = {
        label: mean([found.get(key) for found in by_task.values()]) for label, key in names.items()
    }
    return {**means, **{task: found.get("test") for task, found in by_task.items()}}


def _is_known(figures: dict[str, Any]) -> bool:
    """Whether any figure of a mode is known."""
    return any(value is not None for one in figures.values() for value in one["values"])


Grid = tuple[str, list[str], list[list[str]]]  # title, header, rows


def grids(summary: dict[str, Any], tasks: Sequence[str], control: str | None) -> list[Grid]:
    """The figures as tables, accuracies in percent on the test splits."""

    def row(figures: dict[str, Any], keys: Sequence[str]) -> list[str]:
        return [spread(figures[key]["values"]) for key in keys]

    zeroshot = summary["single"]["none"]
    columns = [*tasks, "mean"]
    shown = {m: f for m, f in summary["single"].items() if _is_known(f)}
    single = [[MODES[m].label, *row(f, columns)] for m, f in shown.items()]

    at_one = [AT_ONE] if any(AT_ONE in f for f in summary["addition"].values()) else []
    keys = ("absolute", "normalised", "zero-shot normalised")
    addition = [["zero-shot", *row(zeroshot, columns), "", "", "0", *("" for _ in at_one)]]
    for mode, figures in summary["addition"].items():
        values = figures["coefficient"]["values"]
        coefs = ", ".join("-" if coef is None else f"{coef:g}" for coef in values)
        cells = row(figures, [*tasks, *keys])
        addition.append([MODES[mode].label, *cells, coefs, *row(figures, at_one)])
        if solved := summary.get("solved", {}).get(mode):
            empty = ["" for _ in ("normalised", "zero-shot normalised", "coef", *at_one)]
            addition.append(
                [f"{MODES[mode].label}, solved", *row(solved, [*tasks, "absolute"]), *empty]
            )

    title = "Task negation: accuracy on the forgotten task, and on the control set (mean)"
    negation = [["zero-shot", *row(zeroshot, [*columns, *([control] if control else [])])]]
    if not _is_known(zeroshot):
        addition, negation = addition[1:], negation[1:]
    for mode, figures in summary["negation"].items() if control else ():
        negation.append([MODES[mode].label, *row(figures, [*tasks, "target", "control"])])

    sums = ["%", *tasks, "mean", "normalised", "zero-shot normalised", "coef", *at_one]
    parts = [
        ("Single-task accuracy", ["%", *columns], single),
        ("Task addition: the sum of all task vectors", sums, addition),
    ]
    if control:
        parts.append((title, ["%", *columns, f"control {control}"], negation))
    return parts


def tables(summary: dict[str, Any], tasks: Sequence[str], control: str | None) -> str:
    """The `grids` in Markdown."""
    parts = grids(summary, tasks, control)
    return "\n\n".join(
        f"**{title}**\n\n{markdown_table(header, rows)}" for title, header, rows in parts
    )


def latex_tables(summary: dict[str, Any], tasks: Sequence[str], control: str | None) -> str:
    """The `grids` in LaTeX."""
    parts = grids(summary, tasks, control)
    return "\n".join(f"% {title}\n{booktabs(header, rows)}" for title, header, rows in parts)


def summary_path(run: Run, ending: str = "json") -> Path:
    """A file of the summary, beside the runs' folders; that of a sample has a name of its own."""
    return run.results.parent / f"summary{run.sampled}.{ending}"


def overview_path(run: Run) -> Path:
    """The summary's figure."""
    return run.results.parent / "figures" / f"overview{run.sampled}.png"


def write_summary(runs: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """Writes the summary as JSON, Markdown and LaTeX, see `summary_path`.

    Returns:
        The figures, see `collect`, and the tables.
    """
    first = runs[0]
    summary = collect(runs)
    text = tables(summary, first.tasks, first.control_set)
    provenances = []
    for run in runs:
        origin = optional_results(accuracies_path(run, "none")).get("provenance", {})
        shared = {k: origin.get(k) for k in ("commit", "machine", "versions", "theta0_hash")}
        shared = {"seed": run.seed, **shared}
        seconds = {
            path.stem: optional_results(path).get("provenance", {}).get("seconds")
            for path in sorted(run.results.glob("*.json"))
        }
        provenances.append({**shared, "seconds": seconds})
    facts = {"suite": first.suite.name, "tasks": first.tasks, "runs": provenances}
    write_json(summary_path(first), {**facts, **summary})
    seeds = ", ".join(str(p["seed"]) for p in provenances)
    sample = first.config.sample
    splits = "the test splits" if sample is None else f"{sample} examples of each test split"
    head = (
        f"# {facts['suite']}, {getattr(first, 'model', '')}\n\n"
        f"Accuracy in percent on {splits}; seeds: {seeds}"
        f"{'' if len(runs) == 1 else ' (mean ± standard deviation)'}. Coefficients are chosen on "
        "the validation splits.\n\n"
    )
    write_text(summary_path(first, "md"), without_home(head) + text + "\n")
    latex = latex_tables(summary, first.tasks, first.control_set)
    write_text(summary_path(first, "tex"), latex)
    return summary, text


def summarised(run: Run) -> list[Run]:
    """The runs of the summary beside a run's folder, by seed; none without a sound summary."""
    found = _read_summary(summary_path(run)).get("runs", [])
    found = found if isinstance(found, list) else []
    seeds = [one.get("seed") for one in found if isinstance(one, dict)]
    return [with_seed(run, seed) for seed in seeds if type(seed) is int and seed >= 0]


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UsageError:  # missing, or damaged
        return {}


def siblings(run: Run) -> list[Run]:
    """The runs that differ from this one in their seed and have results, by seed; with this one."""
    folder = run.results
    own = re.sub(r"_seed\d+", "", folder.name) if run.config.seed is not None else folder.name
    stem, sample, end = own.partition("_sample")
    seeds = {run.seed}
    for path in folder.parent.glob(f"{glob.escape(stem)}_seed*{glob.escape(sample + end)}"):
        if match := re.fullmatch(
            rf"{re.escape(stem)}_seed(\d+){re.escape(sample + end)}", path.name
        ):
            seeds.add(int(match[1]))
    other = run.with_(save=None)  # --save is one run's folder
    runs = [run if s == run.seed else _kept(with_seed(other, s)) for s in sorted(seeds | {0})]
    return [one for one in runs if one.seed == run.seed or any(one.results.glob("*.json"))]


def _kept(run: Run) -> Run:
    """The run, or for one without `--seed` and without results that with `--seed=0`."""
    unnamed = run.config.seed is None and not any(run.results.glob("*.json"))
    return run.with_(seed=0) if unnamed else run


def with_seed(run: Run, seed: int) -> Run:
    """The run with this seed; seed 0 is the run without `--seed`."""
    return run.with_(seed=seed or None)
