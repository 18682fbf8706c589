"""Figures of the study of learning rates and seeds, whose rows `scripts/study_rates.py` makes.

Source: arXiv:2212.04089, the figures on learning rates and on vectors along fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import means, panels
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.run import Run

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the steps
PANELS = {
    "single tasks": {"single": "-"},
    "sum of all": {"sum": "-"},
    "negated task": {"target": "-", "control": ":"},
}


def draw(rows: Sequence[Mapping[str, Any]], run: Run) -> Any:
    """Accuracies against the rate by mode, with the standard deviation over seeds.

    Rates at which a seed diverged have a cross on the axis; their points are of the other seeds.

    Args:
        rows: of each mode, factor and seed; without accuracies if "diverged".
        run: any of the study's runs.
    """
    values = [column for lines in PANELS.values() for column in lines]
    table = pd.DataFrame(rows, columns=["mode", "factor", "seed", "diverged", *values])
    table = table.astype(dict.fromkeys(values, float))
    figure, axes = panels(1, len(PANELS), width=3.2, height=3.2)
    for axis, (title, lines) in zip(axes[0], PANELS.items(), strict=True):
        for mode in distinct(table["mode"]):
            own = table[table["mode"] == mode.name]
            for column, line in lines.items():
                mean, spread = means(own, "factor", column)
                label = mode.label if line == "-" else f"{mode.label}, {run.control}"
                style: dict[str, Any] = {"color": mode.colour, "marker": mode.marker, "ms": 4}
                axis.errorbar(mean.index, mean, spread, ls=line, label=label, **style)
            lost = sorted(set(own.loc[own["diverged"].notna(), "factor"]))
            for factor in lost:
                place: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
                axis.plot(factor, 0.0, "x", color=mode.colour, **place)
        axis.set(title=title, xscale="log", xlabel="rate, in those of the suite")
        axis.legend()
    axes[0][0].set_ylabel("mean test accuracy, %")
    return figure


def draw_along(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Cosines of the vectors along fine-tuning with those of its end, a panel a mode, by rate.

    Means over the tasks, interpolated at `SHARES` of the steps; bars are over seeds.

    Args:
        rows: of each mode, factor and seed, with "along": by task the cosine at each step.
    """
    known = [row for row in rows if "along" in row]
    modes = distinct(row["mode"] for row in known)
    figure, axes = panels(1, max(1, len(modes)), width=3.25, height=3.2)
    factors = sorted({row["factor"] for row in known})
    colours = dict(zip(factors, palette.ordered(len(factors)), strict=True))
    for axis, mode in zip(axes[0], modes, strict=False):
        for factor in factors:
            own = [r["along"] for r in known if (r["mode"], r["factor"]) == (mode.name, factor)]
            if not own:
                continue
            cosines = np.array([np.mean([_at_shares(t) for t in a.values()], axis=0) for a in own])
            spread = cosines.std(axis=0, ddof=1) if len(own) > 1 else None
            style: dict[str, Any] = {"color": colours[factor], "marker": mode.marker, "ms": 4}
            axis.errorbar(SHARES, cosines.mean(axis=0), spread, label=f"rate x {factor:g}", **style)
        axis.set(title=mode.label, xlabel="share of the steps", xticks=SHARES, ylim=(None, 1.02))
        axis.legend(loc="lower right")
    axes[0][0].set_ylabel("cosine with the end, mean of the tasks")
    return figure


def _at_shares(by_step: Mapping[str, float]) -> Any:
    steps = np.array([*map(int, by_step)])
    return np.interp(SHARES, steps / steps.max(), [*by_step.values()])
