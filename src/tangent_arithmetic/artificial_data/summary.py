"""Summary of the study's tables over seeds, at coefficients chosen on validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef, least_kept, warn_of_ties
from tangent_arithmetic.artificial_data.presets import BASE
from tangent_arithmetic.run.summary import spread

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 1e-6  # of means, and of the accuracies in CSV files
KEPT = 0.95  # share of the control accuracy that a negation must keep
Tables = Mapping[str, "pd.DataFrame"]


def training(tables: Tables) -> list[list[str]]:
    """One row a model: accuracy on train, val and test, mean over tasks, and chance level."""
    table = tables["training"]
    means = table.groupby(["model", "split", "seed"])["accuracy"].mean()
    rows = []
    for model in table["model"].unique():
        cells = [spread(means[model, split]) for split in ("train", "val", "test")]
        chance = table[table["model"] == model]["chance"].mean()
        rows.append([model, *cells, f"{100 * chance:.1f}"])
    return rows


def operations(tables: Tables) -> list[list[str]]:
    """One row an operation and start: test accuracy at 0, the best one, its place, the last one."""
    table = tables["operations"]
    rows = []
    for (start, operation), part in table.groupby(["start", "operation"], sort=False):
        grid = part.pivot_table(index="seed", columns="coefficient", values="accuracy")
        best, last = largest(grid.mean())[0], grid.columns[-1]
        accuracies = [spread(grid[0.0]), spread(grid[best]), str(best), spread(grid[last])]
        share = 100 * (1 - part["finite"].mean())
        rows.append([f"{operation}, {start}", *accuracies, f"{share:.1f}"])
    return rows


def sums(tables: Tables) -> list[list[str]]:
    """One row a mode and number of vectors: accuracy before and after, normalised, coefficients."""
    own = tables["training"].rename(columns={"model": "mode", "accuracy": "own"})
    table = tables["sums"].merge(own, on=["seed", "mode", "dataset", "split"])
    table["normalized"] = (table["accuracy"] / table["own"]).where(table["own"] > 0, 0.0)
    table["vectors"] = table["tasks"].str.count(r"\+") + 1
    rows, ties = [], []
    for (count, mode), part in table.groupby(["vectors", "mode"], sort=False):
        chosen, before, after, relative = [], [], [], []
        for _, one in part.groupby(["seed", "tasks"]):
            means = one.groupby(["split", "coefficient"])[["accuracy", "normalized"]].mean()
            ties.append(largest(means["normalized"]["val"]))
            coef = ties[-1][0]
            chosen.append(coef)
            before.append(means["accuracy"]["test", 0.0])
            after.append(means["accuracy"]["test", coef])
            relative.append(means["normalized"]["test", coef])
        cells = [by_seed(part, values) for values in (before, after, relative)]
        rows.append([f"{count} vectors, {mode}", *cells, span(chosen)])
    warn_of_ties(ties, None, "sums")
    return rows


def negations(tables: Tables) -> list[list[str]]:
    """One row a mode: accuracy of task and control before and after, coefficients."""
    table = tables["negations"]
    rows = []
    for mode, part in table.groupby("mode", sort=False):
        chosen: list[float] = []
        accuracies: list[list[float]] = []
        for (_, task), one in part.groupby(["seed", "negated"]):
            wide = one.pivot_table(
                index=["split", "coefficient"], columns="dataset", values="accuracy"
            )
            val, test = (
                wide.loc[split].rename(columns={task: "target", BASE: "control"})
                for split in ("val", "test")
            )
            coef = find_optimal_coef(
                val.to_dict("index"),
                metric="target",
                minimize=True,
                control_metric="control",
                control_metric_threshold=least_kept(KEPT, val["control"][0.0]),
            )
            chosen.append(coef)
            accuracies.append(
                [test[column][at] for column in ("target", "control") for at in (0.0, coef)]
            )
        cells = [by_seed(part, list(values)) for values in zip(*accuracies, strict=True)]
        rows.append([str(mode), *cells, span(chosen)])
    return rows


def interpolations(tables: Tables) -> list[list[str]]:
    """One row a mode: accuracy on a task at the weights 1, 0.5 and 0 of its own vector."""
    table = tables["interpolations"]
    weight = np.where(table["dataset"] == table["second"], table["alpha"], 1 - table["alpha"])
    table = table.assign(weight=np.round(weight, 2))
    means = table.groupby(["mode", "weight", "seed"])["accuracy"].mean()
    return [
        [mode, *(spread(means[mode, weight]) for weight in (1.0, 0.5, 0.0))]
        for mode in table["mode"].unique()
    ]


def largest(means: pd.Series) -> list[float]:
    """All coefficients with the largest mean, in order; up to `ROUNDING`, which decides nothing."""
    return sorted(means.index[means >= means.max() - ROUNDING])


def by_seed(part: pd.DataFrame, values: list[float]) -> str:
    """Mean ± standard deviation over seeds, of values grouped by seed."""
    groups = np.split(np.array(values), part["seed"].nunique())
    return spread([float(np.mean(each)) for each in groups])


def span(values: list[float]) -> str:
    """The range of some values, as text."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
