"""The tables of a whole run, and of several seeds: mean and standard deviation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.checkpoints import write_text
from src.results import (
    accuracies_path,
    arithmetic_path,
    load_results,
    markdown_table,
    results_dir,
)
from src.settings import control_of, suite_of, tasks_of

SINGLE = {"none": "zero-shot", "standard": "standard", "linear": "linear", "posthoc": "post-hoc"}
EDITED = {mode: label for mode, label in SINGLE.items() if mode != "none"}


def spread(values: Sequence[float]) -> str:
    """Accuracies in percent: the one value, or mean and standard deviation over seeds."""
    percents = 100 * np.asarray(values)
    if len(percents) == 1:
        return f"{percents[0]:.1f}"
    return f"{percents.mean():.1f} ± {percents.std(ddof=1):.1f}"


def _numbers(values: Sequence[float]) -> dict[str, Any]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "values": list(map(float, values))}


def collect(runs: Sequence[Any]) -> dict[str, Any]:
    """The figures of one or more runs that differ in their seed.

    Args:
        runs: the settings of each run.

    Returns:
        {"single": {mode: {data set: figures}}, "addition": {mode: {metric: figures}}, "negation":
        ...}, where figures are {"mean", "std", "values"} over the runs.
    """
    first = runs[0]
    tasks, control = tasks_of(first), control_of(first)

    def gather(path_of: Callable[..., Path], pick: Callable[..., Any], *which: str) -> Any:
        found = [pick(load_results(path_of(run, *which))) for run in runs]
        return {key: _numbers([one[key] for one in found]) for key in found[0]}

    def single(mode: str) -> Callable[[dict[str, Any]], dict[str, float]]:
        names = [*tasks, control] if mode == "none" else tasks

        def pick(results: dict[str, Any]) -> dict[str, float]:
            mean = float(np.mean([results[task] for task in tasks]))
            return {**{name: results[name] for name in names}, "mean": mean}

        return pick

    def addition(results: dict[str, Any]) -> dict[str, float]:
        return {
            "coefficient": results["coefficient"],
            "zero-shot": results["zeroshot"]["avg_top1"],
            "absolute": results["test"]["avg_top1"],
            "zero-shot normalised": results["zeroshot"]["avg_normalized_top1"],
            "normalised": results["test"]["avg_normalized_top1"],
            **{task: results["test"][f"{task}:top1"] for task in tasks},
        }

    def negation(results: dict[str, Any]) -> dict[str, float]:
        names = {
            "zero-shot": "zeroshot",
            "target": "test",
            "zero-shot control": "zeroshot_control",
            "control": "test_control",
        }
        means = {
            label: float(np.mean([results[task][key] for task in tasks]))
            for label, key in names.items()
        }
        return {**means, **{task: results[task]["test"] for task in tasks}}

    return {
        "single": {m: gather(accuracies_path, single(m), m) for m in SINGLE},
        "addition": {m: gather(arithmetic_path, addition, m, "additions") for m in EDITED},
        "negation": {m: gather(arithmetic_path, negation, m, "negations") for m in EDITED},
    }


def tables(summary: dict[str, Any], tasks: Sequence[str], control: str) -> str:
    """The figures as three Markdown tables, accuracies in percent on the test splits."""

    def row(figures: dict[str, Any], keys: Sequence[str]) -> list[str]:
        return [spread(figures[key]["values"]) for key in keys]

    zeroshot = summary["single"]["none"]
    columns = [*tasks, "mean"]
    single = [[SINGLE[m], *row(f, columns)] for m, f in summary["single"].items()]

    keys = ("absolute", "normalised", "zero-shot normalised")
    addition = [["zero-shot", *row(zeroshot, columns), "", "", "0"]]
    for mode, figures in summary["addition"].items():
        coefs = ", ".join(f"{c:g}" for c in figures["coefficient"]["values"])
        cells = row(figures, [*tasks, *keys])
        addition.append([EDITED[mode], *cells, coefs])

    negation = [["zero-shot", *row(zeroshot, [*columns, control])]]
    for mode, figures in summary["negation"].items():
        negation.append([EDITED[mode], *row(figures, [*tasks, "target", "control"])])

    parts = [
        ("Single-task accuracy", markdown_table(["%", *columns], single)),
        (
            "Task addition: the sum of all task vectors",
            markdown_table(
                ["%", *tasks, "mean", "normalised", "zero-shot normalised", "coef"], addition
            ),
        ),
        (
            "Task negation: accuracy on the forgotten task, and on the control set (mean)",
            markdown_table(["%", *tasks, "mean", f"control {control}"], negation),
        ),
    ]
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in parts)


def write_summary(runs: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """Writes summary.json and summary.md beside the runs' folders.

    Returns:
        The figures, see `collect`, and the tables.
    """
    first = runs[0]
    summary = collect(runs)
    text = tables(summary, tasks_of(first), control_of(first))
    folder = results_dir(first).parent
    provenances = []
    for run in runs:
        origin = load_results(accuracies_path(run, "none"))["provenance"]
        shared = {k: origin[k] for k in ("seed", "commit", "machine", "versions", "theta0_hash")}
        seconds = {
            path.stem: load_results(path).get("provenance", {}).get("seconds")
            for path in sorted(results_dir(run).glob("*.json"))
        }
        provenances.append({**shared, "seconds": seconds})
    facts = {"suite": suite_of(first).name, "tasks": tasks_of(first), "runs": provenances}
    write_text(folder / "summary.json", json.dumps({**facts, **summary}, indent=2) + "\n")
    seeds = ", ".join(str(p["seed"]) for p in provenances)
    head = (
        f"# {facts['suite']}, {getattr(first, 'model', '')}\n\n"
        f"Accuracy in percent on the test splits; seeds: {seeds}"
        f"{'' if len(runs) == 1 else ' (mean ± standard deviation)'}. Coefficients are chosen on "
        "the validation splits.\n\n"
    )
    write_text(folder / "summary.md", head + text + "\n")
    return summary, text


def with_seed(args: Any, seed: int) -> Any:
    """The settings of the run with this seed; seed 0 is the run without `--seed`."""
    changed = copy.copy(args)
    changed.seed = seed or None
    return changed
