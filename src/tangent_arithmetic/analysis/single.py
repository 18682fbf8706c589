"""One task alone: standard fine-tuning against its linearisation and against linear fine-tuning.

Source: arXiv:2305.12827, the comparison of single-task accuracies; the non-linear advantage is
`tangent_arithmetic.arithmetic.sweeps.nonlinear_advantage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.figures import panels
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.results import accuracies_path, found_results
from tangent_arithmetic.run.run import Run

OTHERS = ("posthoc", "linear")


def table(run: Run, modes: Sequence[str] = ()) -> pd.DataFrame:
    """Test accuracies by task, from the files of results, and the gaps to standard fine-tuning.

    Returns:
        Columns task, classes, zeroshot, standard, posthoc, linear, and for the last two the
        normalised gap to standard, advantage_posthoc and advantage_linear.
    """
    suite = run.suite
    found = {
        mode: found_results(
            accuracies_path(run, mode), command("eval_single_task", run, mode), run.tasks
        )
        for mode in ("none", "standard", *OTHERS)
    }
    rows: list[dict[str, Any]] = []
    for task in run.tasks:
        classes = suite.tasks[task].num_classes
        row = {m if m != "none" else "zeroshot": found[m][task] for m in found}
        gaps = {
            f"advantage_{m}": nonlinear_advantage(row[m], row["standard"], classes) for m in OTHERS
        }
        rows.append({"task": task, "classes": classes, **row, **gaps})
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame, run: Run) -> Any:
    """Each task's accuracy against that of standard fine-tuning; the gaps as bars."""
    figure, axes = panels(1, 2, width=4.4, height=3.8)
    left, right = axes[0]
    low = 100 * found[["zeroshot", *OTHERS]].min().min() - 5
    left.plot([low, 100], [low, 100], color="#999999", lw=1, zorder=0)
    for mode in ("zeroshot", *OTHERS):
        key = "none" if mode == "zeroshot" else mode
        left.plot(
            100 * found["standard"], 100 * found[mode], MODES[key].marker, color=MODES[key].colour,
            label=MODES[key].label, ms=6,
        )  # fmt: skip
    left.set(xlabel="standard fine-tuning, accuracy, %", ylabel="accuracy, %", aspect="equal")
    left.legend(frameon=False, fontsize=8)
    places = range(len(found))
    for k, mode in enumerate(OTHERS):
        right.barh(
            [p + 0.4 * k - 0.2 for p in places], 100 * found[f"advantage_{mode}"], 0.38,
            color=MODES[mode].colour, label=f"over {MODES[mode].label}",
        )  # fmt: skip
    right.set_yticks(list(places), list(found["task"]))
    right.invert_yaxis()
    right.set_xlabel("advantage of standard fine-tuning, % of the error of chance")
    right.legend(frameon=False, fontsize=8)
    return figure
