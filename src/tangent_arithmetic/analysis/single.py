"""Single-task accuracy: standard fine-tuning against post-hoc linearisation and linear fine-tuning.

Source: arXiv:2305.12827, the comparison of single-task accuracies and the non-linear advantage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import in_paper, panels
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.results import accuracies_path, complete_results
from tangent_arithmetic.run.run import Run

OTHERS = ("posthoc", "linear")


def table(run: Run, modes: Sequence[str] = ()) -> pd.DataFrame:
    """Test accuracies by task, and the normalised gaps to standard fine-tuning.

    Args:
        run: the run, whose result files hold the accuracies.
        modes: ignored.

    Returns:
        Columns task, classes, zeroshot, standard, posthoc, linear, advantage_posthoc and
        advantage_linear.
    """
    columns: dict[str, Any] = {
        "task": run.tasks,
        "classes": [len(run.data.classnames(task)) for task in run.tasks],
    }
    for mode in ("none", "standard", *OTHERS):
        made_by = command("eval_single_task", run, mode)
        results = complete_results(accuracies_path(run, mode), made_by, run.tasks)
        column = "zeroshot" if mode == "none" else mode
        columns[column] = [results[task] for task in run.tasks]
    for mode in OTHERS:
        gaps = zip(columns[mode], columns["standard"], columns["classes"], strict=True)
        columns[f"advantage_{mode}"] = [nonlinear_advantage(*gap) for gap in gaps]
    return pd.DataFrame(columns)


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Each task's accuracy against that of standard fine-tuning; the gaps as bars."""
    figure, axes = panels(1, 2, width=4.4, height=3.8)
    left, right = axes[0]
    _scatter(left, table)
    places = range(len(table))
    for k, mode in enumerate(MODES[name] for name in OTHERS):
        gaps, label = 100 * table[f"advantage_{mode.name}"], f"over {mode.label}"
        shifted = [place + 0.4 * k - 0.2 for place in places]
        right.barh(shifted, gaps, 0.38, color=mode.colour, label=label)
    right.set_yticks(list(places), list(table["task"]))
    right.invert_yaxis()
    right.set_xlabel("advantage of standard fine-tuning,\n% of the error of chance")
    right.legend()
    return figure


def _scatter(axis: Any, table: pd.DataFrame) -> None:
    """A column of points a task, with its name below."""
    columns = ["zeroshot", *OTHERS]
    x = 100 * table["standard"]
    low, high = 100 * table[columns].min(axis=1), 100 * table[columns].max(axis=1)
    bottom, end = float(low.min()), max(100.0, float(x.max()))
    start = min(bottom, float(x.min()))
    axis.plot([start, end], [start, end], color=palette.REFERENCE, lw=1, zorder=0)
    axis.vlines(x, low, high, color=palette.REFERENCE, lw=0.6, alpha=0.6, zorder=0)
    for column in columns:
        mode = MODES["none" if column == "zeroshot" else column]
        style = {"marker": mode.marker, "color": mode.colour, "label": mode.label}
        axis.plot(x, 100 * table[column], linestyle="none", **style)
    left, width = float(x.min()) - 3, float(x.max() - x.min()) + 8
    places = spaced(x.tolist(), (0.06 if in_paper() else 0.045) * width)
    for name, place, y in zip(table["task"], places, low, strict=True):
        look: dict[str, Any] = {"ha": "center", "va": "top", "color": palette.INK}
        shift: dict[str, Any] = {"rotation": 90, "textcoords": "offset points", "xytext": (0, -6)}
        axis.annotate(name, (place, y), fontsize="small", **shift, **look)
    axis.set(xlim=(left, left + width), ylim=(bottom - 0.35 * (end - bottom), end + 2))
    axis.set(xlabel="standard fine-tuning, accuracy, %", ylabel="accuracy, %")
    axis.legend(loc="upper left")


def spaced(places: Sequence[float], least: float) -> list[float]:
    """The places, moved right where one is less than `least` from the one before.

    >>> spaced([3.0, 0.0, 0.5], 1.0)
    [3.0, 0.0, 1.0]
    """
    moved = list(places)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    return moved
