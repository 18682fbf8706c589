"""Negation: accuracy on the forgotten task against its cost on the control set.

Source: arXiv:2212.04089, the negation experiments.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import panels
from tangent_arithmetic.analysis.tables import other_settings
from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.metrics import main_metric
from tangent_arithmetic.run.models import changed_weights, command
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.results import arithmetic_path, complete_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import siblings
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)

SETTINGS = ("precision", "head", "template", "control_dataset")  # that curves depend on


def curves(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Validation accuracies at each negation coefficient, from the result files of all seeds.

    Another seed whose negations `negations` refuses is left out with a warning.

    Returns:
        Columns mode, task, coefficient, target and control (accuracies), seed.
    """
    rows: list[tuple[str, str, float, float, float, int]] = []
    for mode in modes:
        swept = {run.seed: _swept(run, mode)}
        for one in siblings(run):
            if one.seed == run.seed or not arithmetic_path(one, mode, "negations").is_file():
                continue
            try:
                swept[one.seed] = _swept(one, mode)
            except UsageError as error:
                logger.warning("%s: seed %d is left out: %s", mode, one.seed, error)
        for seed, (found, keys) in swept.items():
            for task, (target, control) in keys.items():
                rows += [
                    (mode, task, float(coef), metrics[target], metrics[control], seed)
                    for coef, metrics in found[task]["val"].items()
                    if {target, control} <= metrics.keys()
                ]
    return pd.DataFrame(rows, columns=["mode", "task", "coefficient", "target", "control", "seed"])


def _swept(run: Run, mode: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A mode's negations, with the keys of the main metrics of each task and the control set."""
    found = negations(run, mode, [(task, "val", "0.0") for task in run.tasks])
    keys = {}
    for task in run.tasks:
        metrics, names = found[task]["val"]["0.0"], (f"{task}Val", f"{run.control}Val")
        keys[task] = [f"{name}:{main_metric(metrics, name) or 'top1'}" for name in names]
    needed = [(task, "val", "0.0", key) for task in run.tasks for key in keys[task]]
    return negations(run, mode, needed), keys


def negations(run: Run, mode: str, needed: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """A mode's negations, by task, checked to hold all that is needed and to be of this run.

    Raises:
        MissingFileError: if there are none.
        UsageError: if they are damaged, or of other settings, coefficients or checkpoints; the
            latter are compared where they are there.
    """
    path = arithmetic_path(run, mode, "negations")
    made_by = command("eval_task_negation", run, mode)
    found = complete_results(path, made_by, needed)
    origin = found.get("provenance", {})
    expected = coefficients(run.config.n_eval_points)
    wrong = [f"another {flag}" for flag in other_settings(run, origin.get("config", {}), SETTINGS)]
    wrong += changed_weights(run, mode, origin, run.tasks)
    for task in run.tasks:
        if (swept := sorted(map(float, found[task]["val"]))) != expected:
            wrong.append(f"{len(swept)} coefficients of {task}, expected {len(expected)}")
    if wrong:
        raise UsageError(
            f"{path} is of another run ({'; '.join(wrong[:3])}). Make it again with: {made_by}"
        )
    return found


def draw_curves(table: pd.DataFrame, run: Run) -> Any:
    """Accuracy on the negated task against that on the control set, mean of the tasks.

    Bands are standard deviations over the seeds.
    """
    table = table if "seed" in table else table.assign(seed=run.seed)
    figure, axes = panels(1, 1, width=5.2, height=3.9)
    axis = axes[0][0]
    for mode in distinct(table["mode"]):
        own = table[table["mode"] == mode.name]
        by_seed = own.groupby(["coefficient", "seed"])[["target", "control"]].mean()
        mean = 100 * by_seed.groupby("coefficient").mean()
        style = {"marker": mode.marker, "ms": 4, "color": mode.colour, "label": mode.label}
        axis.plot(mean["control"], mean["target"], **style)
        if own["seed"].nunique() > 1:
            spread = 100 * by_seed.groupby("coefficient").std()
            low, high = mean["target"] - spread["target"], mean["target"] + spread["target"]
            axis.fill_between(mean["control"], low, high, color=mode.colour, alpha=0.2, lw=0)
    start = 100 * table[table["coefficient"] == 0]["control"].mean()
    least = run.config.control_threshold * start
    axis.axvline(least, color=palette.CONTROL, ls=":", label=f"{least:.1f} %, the threshold")
    axis.set_xlabel(f"validation accuracy on {run.control} (control), %")
    axis.set_ylabel("validation accuracy on the negated task, %")
    axis.invert_xaxis()
    axis.legend()
    return figure
