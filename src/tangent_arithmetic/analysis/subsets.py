r"""Sums of the task vectors of each subset of the tasks.

For a subset S the model is \(\theta_0 + a \sum_{t \in S} \tau_t\), with the coefficient a of the
best mean normalised validation accuracy over all tasks (ties: the smallest), as for the sum of all.
How well the subset's own tasks are kept is measured at a coefficient of its own, the best on their
validation splits alone. Linear models are evaluated on all subsets, from the logits of one pass;
standard models, and linear ones of more than `EVERY` tasks, on single vectors, pairs, the sum of
all, and a sample of the sizes between.

Source: arXiv:2212.04089, the figures on adding subsets of the tasks.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd

from tangent_arithmetic.analysis.edits import EditedEncoder, Edits
from tangent_arithmetic.analysis.figures import heat, in_paper, means, panels, spread_of
from tangent_arithmetic.arithmetic.coefficients import coefficients, largest, warn_of_ties
from tangent_arithmetic.arithmetic.metrics import learned
from tangent_arithmetic.arithmetic.sweeps import smallest
from tangent_arithmetic.run.models import checkpoint_hashes, command
from tangent_arithmetic.run.modes import MODES, distinct
from tangent_arithmetic.run.results import accuracies_path, require_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)

Subset = tuple[str, ...]
EVERY = 10  # tasks, at most, all of whose subsets linear models are evaluated on


def subsets(tasks: Sequence[str], sample: int | None = None) -> list[Subset]:
    """All non-empty subsets, small ones first; or a sample of them, the same in every run.

    Args:
        tasks: the tasks.
        sample: number of subsets of each size from 3 to all but one; None for all. Sizes 1, 2 and
            the full set are always complete.
    """
    chosen: list[Subset] = []
    for size in range(1, len(tasks) + 1):
        of_size = list(combinations(tasks, size))
        if sample is not None and 2 < size < len(tasks) and sample < len(of_size):
            indices = random.Random(f"0 {size}").sample(range(len(of_size)), sample)
            of_size = [of_size[i] for i in sorted(indices)]
        chosen += of_size
    return chosen


def sample_of(run: Run, mode: str) -> int | None:
    """The number of subsets of each size in between that a mode is evaluated on; None for all."""
    every = MODES[mode].linear and len(run.tasks) <= EVERY
    return None if every else run.config.subset_sample


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """The `evaluate`d subsets of each mode, on the test splits of all tasks.

    Returns:
        Columns mode, num_vectors, tasks ("A+B"), coefficient, absolute, normalised (means over all
        tasks), own_coefficient, own_absolute, own_normalised (means over the tasks of the subset,
        at the coefficient that is best for these).
    """
    tasks = run.tasks
    rows: list[dict[str, Any]] = []
    val = [f"{task}Val" for task in tasks]
    for mode in modes:
        edits = Edits(run, mode, tasks)
        linear = MODES[mode].linear
        hashes = checkpoint_hashes(run, tasks, mode)
        made_by = command("eval_single_task", run, mode)
        path, theta0_hash = accuracies_path(run, mode), edits.theta0_hash
        singles = require_results(path, run, theta0_hash, made_by, hashes, [*tasks, *val])
        coefs = coefficients(run.config.n_eval_points if linear else 11)
        chosen = subsets(tasks, sample_of(run, mode))
        passes = len(val) + len(tasks)
        if not linear:
            passes = len(chosen) * (len(coefs) * len(val) + len(tasks)) + sum(map(len, chosen))
        logger.info("subsets: %s, %d subsets, %d passes over a split", mode, len(chosen), passes)
        for row in evaluate(edits, chosen, tasks, singles, coefs, smallest(map(edits.split, val))):
            rows.append({"mode": mode, **row})
    return pd.DataFrame(rows)


def evaluate(
    model: EditedEncoder,
    chosen: Sequence[Subset],
    tasks: Sequence[str],
    singles: Mapping[str, float],
    coefs: Sequence[float],
    num_images: int | None = None,
) -> list[dict[str, Any]]:
    """Test accuracies of subsets, as rows of `table`.

    Args:
        model: has the vectors, and the splits X and XVal, of the tasks.
        chosen: the subsets.
        tasks: the tasks to evaluate on.
        singles: accuracies of the single-task models by split, for the normalisation.
        coefs: coefficients to try.
        num_images: size of the smallest validation split, if known.

    Raises:
        UsageError: if all single-task accuracies of a split are 0.
    """
    points = [dict.fromkeys(subset, coef) for subset in chosen for coef in coefs]
    shape = len(chosen), len(coefs)
    on_val = {
        name: (np.array(model.accuracies(name, points)) / singles[name]).reshape(shape)
        for name in normalisable([f"{task}Val" for task in tasks], singles)
    }
    normal = normalisable(tasks, singles)
    rows: list[dict[str, Any]] = [
        {"num_vectors": len(subset), "tasks": "+".join(subset)} for subset in chosen
    ]
    for prefix, over in (("", [tuple(tasks)] * len(chosen)), ("own_", chosen)):
        tied = []
        for i, names in enumerate(over):
            known = [on_val[f"{t}Val"][i] for t in names if f"{t}Val" in on_val]
            means = np.mean(known or [grid[i] for grid in on_val.values()], axis=0)
            tied.append(largest(dict(zip(coefs, means.tolist(), strict=True))))
        warn_of_ties(tied, num_images, "subsets")
        best = [dict.fromkeys(s, equal[0]) for s, equal in zip(chosen, tied, strict=True)]
        points_of = {
            task: [point for point, names in zip(best, over, strict=True) if task in names]
            for task in tasks
        }
        on_test = {t: iter(model.accuracies(t, some)) for t, some in points_of.items() if some}
        for row, equal, names in zip(rows, tied, over, strict=True):
            absolute = {task: next(on_test[task]) for task in names}
            shares = [absolute[task] / singles[task] for task in names if task in normal]
            row[f"{prefix}coefficient"] = equal[0]
            row[f"{prefix}absolute"] = float(np.mean([*absolute.values()]))
            row[f"{prefix}normalised"] = float(np.mean(shares)) if shares else math.nan
    return rows


def normalisable(names: Sequence[str], singles: Mapping[str, float]) -> list[str]:
    """The splits whose single-task accuracy is not 0.

    Args:
        names: the splits.
        singles: accuracies of the single-task models by split.

    Raises:
        UsageError: if there is none.
    """
    if not (found := learned(names, singles)):
        raise UsageError(
            f"all single-task accuracies on {', '.join(names)} are 0, so none can be normalised by "
            "them; fine-tune again, such as for more epochs"
        )
    return found


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of sums of two vectors.

    Raises:
        UsageError: if their coefficients are those for all tasks, as earlier versions had them.
    """
    if "own_coefficient" not in table:
        raise UsageError(
            "the table of subsets is of an earlier version, which measured the subset's own tasks "
            "at the coefficient for all; make it again by analyze subsets"
        )
    return table[table["num_vectors"] == 2]


def draw_pairs(table: pd.DataFrame, run: Run) -> Any:
    """The normalised accuracy of each sum of two vectors on its own two tasks."""
    table = pairs(table)
    modes = distinct(table["mode"])
    figure, axes = panels(1, len(modes), width=3.25, height=3.3)
    for axis, mode in zip(axes[0], modes, strict=True):
        rows = table[table["mode"] == mode.name]
        names = rows["tasks"].str.split("+", expand=True)
        tasks = list(dict.fromkeys([*names[0], *names[1]]))
        square = pd.DataFrame(np.nan, index=tasks, columns=tasks)
        for one, other, value in zip(names[0], names[1], rows["own_normalised"], strict=True):
            square.loc[one, other] = square.loc[other, one] = value
        image = heat(axis, square, (0.8, 1.0), written=not in_paper())
        axis.set_title(mode.label)
    label = f"normalised accuracy, mean of the two{spread_of(table, 'own_normalised')}"
    figure.colorbar(image, ax=axes[0], extend="both", label=label)
    return figure


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Accuracy against the number of vectors: mean, standard deviation, and each subset.

    Sampled sizes have hollow markers and are not connected by a line. A band is the standard
    deviation of the mean over seeds, where the table has several; points are the subsets' means.
    """
    tasks = len({task for name in table["tasks"] for task in name.split("+")})
    figure, axes = panels(1, 2, width=4.4, height=3.6)
    modes = distinct(table["mode"])
    measures = (("absolute", "accuracy"), ("normalised", "normalised accuracy"))
    for axis, (column, name) in zip(axes[0], measures, strict=True):
        for k, mode in enumerate(modes):
            part = table[table["mode"] == mode.name]
            each = part.groupby(["num_vectors", "tasks"])[column].mean().reset_index()
            shift = min(0.16, 0.6 / len(modes)) * (k - (len(modes) - 1) / 2)
            label, colour, marker = mode.label, mode.colour, mode.marker
            dots = {"ms": 4, "alpha": 0.3, "color": colour, "zorder": 1, "mew": 0}
            axis.plot(each["num_vectors"] + shift, 100 * each[column], ".", **dots)
            by_size = each.groupby("num_vectors")[column]
            spread = 100 * by_size.std(ddof=0)
            mean, band = means(part, "num_vectors", column)
            if band is not None:
                look = {"color": colour, "alpha": 0.25, "lw": 0}
                axis.fill_between(mean.index + shift, mean - band, mean + band, **look)
            complete = by_size.size().to_numpy() == [comb(tasks, size) for size in mean.index]
            what = "subsets" if complete.all() else "subsets, hollow: sampled"
            axis.plot(mean.index + shift, mean.where(complete), color=colour)
            bars = {"fmt": marker, "color": colour, "elinewidth": 1.4, "capthick": 1.4}
            for sizes, face in ((complete, colour), (~complete, "white")):
                bars["label"] = None if face == "white" else f"{label} ({len(each)} {what})"
                x, y, error = mean.index[sizes] + shift, mean[sizes], spread[sizes]
                axis.errorbar(x, y, error, markerfacecolor=face, **bars)
        axis.set(xlabel="number of task vectors added", ylabel=f"{name}, mean of all tasks, %")
        axis.set_xticks(sorted(set(table["num_vectors"])))
    axes[0][0].legend()
    bands = "\nbands: standard deviation over seeds" if band is not None else ""
    title = f"points: subsets; bars: mean ± standard deviation{bands}"
    axes[0][1].set_title(title, fontsize="medium")
    return figure
