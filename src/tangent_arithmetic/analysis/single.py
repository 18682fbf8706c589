"""Single-task accuracy: standard fine-tuning against post-hoc linearisation and linear fine-tuning.

Source: arXiv:2305.12827, the comparison of single-task accuracies and the non-linear advantage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.figures import panels
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.results import accuracies_path, found_results
from tangent_arithmetic.run.run import Run

OTHERS = ("posthoc", "linear")


def comparison(
    accuracies: Mapping[str, Mapping[str, float]], num_classes: Mapping[str, int]
) -> pd.DataFrame:
    """Accuracies by task, and the normalised gaps to standard fine-tuning.

    Args:
        accuracies: mode ("none", "standard", "posthoc", "linear") -> task -> accuracy.
        num_classes: by task.

    Returns:
        Columns task, classes, zeroshot, standard, posthoc, linear, advantage_posthoc and
        advantage_linear.
    """
    rows: list[dict[str, Any]] = []
    for task, classes in num_classes.items():
        row = {m if m != "none" else "zeroshot": accuracies[m][task] for m in accuracies}
        gaps = {
            f"advantage_{m}": nonlinear_advantage(row[m], row["standard"], classes) for m in OTHERS
        }
        rows.append({"task": task, "classes": classes, **row, **gaps})
    return pd.DataFrame(rows)


def table(run: Run, modes: Sequence[str] = ()) -> pd.DataFrame:
    """The `comparison` of test accuracies in the run's result files, whatever the `modes`."""
    accuracies = {
        mode: found_results(
            accuracies_path(run, mode), command("eval_single_task", run, mode), run.tasks
        )
        for mode in ("none", "standard", *OTHERS)
    }
    return comparison(accuracies, {task: run.suite.tasks[task].num_classes for task in run.tasks})


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Each task's accuracy against that of standard fine-tuning; the gaps as bars."""
    figure, axes = panels(1, 2, width=4.4, height=3.8)
    left, right = axes[0]
    low = 100 * table[["zeroshot", *OTHERS]].min().min() - 5
    left.plot([low, 100], [low, 100], color="#999999", lw=1, zorder=0)
    for column in ("zeroshot", *OTHERS):
        mode = MODES["none" if column == "zeroshot" else column]
        left.plot(
            100 * table["standard"], 100 * table[column], mode.marker, color=mode.colour,
            label=mode.label, ms=6,
        )  # fmt: skip
    left.set(xlabel="standard fine-tuning, accuracy, %", ylabel="accuracy, %", aspect="equal")
    left.legend(frameon=False, fontsize=8)
    places = range(len(table))
    for k, mode in enumerate(MODES[name] for name in OTHERS):
        right.barh(
            [p + 0.4 * k - 0.2 for p in places], 100 * table[f"advantage_{mode.name}"], 0.38,
            color=mode.colour, label=f"over {mode.label}",
        )  # fmt: skip
    right.set_yticks(list(places), list(table["task"]))
    right.invert_yaxis()
    right.set_xlabel("advantage of standard fine-tuning, % of the error of chance")
    right.legend(frameon=False, fontsize=8)
    return figure
