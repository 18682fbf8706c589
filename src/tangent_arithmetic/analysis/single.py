"""Single-task accuracy: standard fine-tuning against post-hoc linearisation and linear fine-tuning.

Source: arXiv:2305.12827, the comparison of single-task accuracies and the non-linear advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.figures import panels
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
        "classes": [run.suite.tasks[task].num_classes for task in run.tasks],
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
    low = 100 * table[["zeroshot", *OTHERS]].min().min() - 5
    left.plot([low, 100], [low, 100], color="#999999", lw=1, zorder=0)
    for column in ("zeroshot", *OTHERS):
        mode = MODES["none" if column == "zeroshot" else column]
        style = {"marker": mode.marker, "color": mode.colour, "label": mode.label, "ms": 6}
        left.plot(100 * table["standard"], 100 * table[column], linestyle="none", **style)
    left.set(xlabel="standard fine-tuning, accuracy, %", ylabel="accuracy, %", aspect="equal")
    left.legend(frameon=False, fontsize=8)
    places = range(len(table))
    for k, mode in enumerate(MODES[name] for name in OTHERS):
        gaps, label = 100 * table[f"advantage_{mode.name}"], f"over {mode.label}"
        shifted = [place + 0.4 * k - 0.2 for place in places]
        right.barh(shifted, gaps, 0.38, color=mode.colour, label=label)
    right.set_yticks(list(places), list(table["task"]))
    right.invert_yaxis()
    right.set_xlabel("advantage of standard fine-tuning, % of the error of chance")
    right.legend(frameon=False, fontsize=8)
    return figure
