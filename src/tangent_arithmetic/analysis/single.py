"""Single-task accuracy: standard fine-tuning against its linearisation and all other modes.

Source: arXiv:2305.12827, the comparison of single-task accuracies and the non-linear advantage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import in_paper, over_seeds, panels
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage
from tangent_arithmetic.run.models import checkpoint_hashes, command, zeroshot_encoder
from tangent_arithmetic.run.modes import MODES, Mode, distinct
from tangent_arithmetic.run.present import with_results
from tangent_arithmetic.run.results import accuracies_path, require_results
from tangent_arithmetic.run.run import Run

FIRST = ("posthoc", "linear")  # of the modes compared with standard fine-tuning
ADVANTAGE = "advantage_"


def table(run: Run, modes: Sequence[str] = ()) -> pd.DataFrame:
    """Test accuracies by task, and the normalised gaps to standard fine-tuning.

    Args:
        run: the run, whose result files hold the accuracies.
        modes: those to compare with standard fine-tuning; all with results if empty.

    Returns:
        Columns task, classes, zeroshot, standard, and for each other mode with results MODE and
        advantage_MODE, such as posthoc and advantage_posthoc.
    """
    found = list(modes)
    if not found:
        known = with_results(run.results)
        found = [mode for mode in known if accuracies_path(run, mode).is_file()]
        found = found if set(found) - {"none", "standard"} else [*FIRST]  # whose absence is told
    others = [*(mode for mode in FIRST if mode in found)]
    others += [mode for mode in found if mode not in ("none", "standard", *FIRST)]
    theta0_hash = zeroshot_encoder(run)[1]
    columns: dict[str, Any] = {
        "task": run.tasks,
        "classes": [len(run.data.classnames(task)) for task in run.tasks],
    }
    for mode in ("none", "standard", *others):
        made_by = command("eval_single_task", run, mode)
        hashes = None if mode == "none" else checkpoint_hashes(run, run.tasks, mode)
        path = accuracies_path(run, mode)
        results = require_results(path, run, theta0_hash, made_by, hashes, run.tasks)
        column = "zeroshot" if mode == "none" else mode
        columns[column] = [results[task] for task in run.tasks]
    for mode in others:
        gaps = zip(columns[mode], columns["standard"], columns["classes"], strict=True)
        columns[f"{ADVANTAGE}{mode}"] = [nonlinear_advantage(*gap) for gap in gaps]
    return pd.DataFrame(columns)


def compared(table: pd.DataFrame) -> list[Mode]:
    """The modes that a table compares with standard fine-tuning, in the order of its columns."""
    columns = [c for c in table.columns if c.startswith(ADVANTAGE) and not c.endswith(" std")]
    names = [c.removeprefix(ADVANTAGE) for c in columns]
    looks = {mode.name: mode for mode in distinct(names)}
    return [looks[name] for name in names]


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Each task's accuracy against that of standard fine-tuning; the gaps as bars."""
    figure, axes = panels(1, 2, width=4.4, height=3.8)
    left, right = axes[0]
    _scatter(left, table)
    places = range(len(table))
    others = compared(table)
    step = 0.8 / max(len(others), 1)
    for k, mode in enumerate(others):
        column, label = f"{ADVANTAGE}{mode.name}", f"over {mode.label}"
        gaps, error = 100 * table[column], over_seeds(table, column)
        shifted = [place + step * (k - (len(others) - 1) / 2) for place in places]
        style = {"color": mode.colour, "ecolor": palette.INK, "label": label}
        right.barh(shifted, gaps, 0.95 * step, xerr=error, **style)
    right.set_yticks(list(places), list(table["task"]))
    right.invert_yaxis()
    right.set_xlabel("advantage of standard fine-tuning,\n% of the error of chance")
    if others:
        right.legend()
    return figure


def _scatter(axis: Any, table: pd.DataFrame) -> None:
    """A column of points a task, with its name below."""
    modes = {"zeroshot": MODES["none"], **{mode.name: mode for mode in compared(table)}}
    columns = list(modes)
    x = 100 * table["standard"]
    low, high = 100 * table[columns].min(axis=1), 100 * table[columns].max(axis=1)
    bottom, end = float(low.min()), max(100.0, float(x.max()))
    start = min(bottom, float(x.min()))
    axis.plot([start, end], [start, end], color=palette.REFERENCE, lw=1, zorder=0)
    axis.vlines(x, low, high, color=palette.REFERENCE, lw=0.6, alpha=0.6, zorder=0)
    for column, mode in modes.items():
        style = {"fmt": mode.marker, "color": mode.colour, "label": mode.label}
        errors = over_seeds(table, column), over_seeds(table, "standard")
        axis.errorbar(x, 100 * table[column], *errors, **style)
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
