"""Negation: its cost on the control set, and a comparison with random vectors.

A random vector has the norm of the task vector in each weight. It is negated, and its coefficient
chosen, in the same way.

Source: arXiv:2212.04089, the negation experiments and their random-vector baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import named, panels
from tangent_arithmetic.arithmetic.metrics import main_metric
from tangent_arithmetic.run.models import base_encoder, command, task_vector, zeroshot_encoder
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.negation import negate_task, zeroshot_accuracies
from tangent_arithmetic.run.results import arithmetic_path, complete_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.statedict import State

# keys of result files, and their columns
COLUMNS = {
    "coefficient": "coefficient",
    "test": "target",
    "test_control": "control",
    "zeroshot": "zeroshot",
    "zeroshot_control": "zeroshot_control",
}


def curves(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Validation accuracies at each negation coefficient, from the run's result files.

    Returns:
        Columns mode, task, coefficient, target and control (accuracies).
    """
    rows: list[tuple[str, str, float, float, float]] = []
    for mode in modes:
        negations, keys = _swept(run, mode)
        for task, (target, control) in keys.items():
            rows += [
                (mode, task, float(coef), metrics[target], metrics[control])
                for coef, metrics in negations[task]["val"].items()
                if {target, control} <= metrics.keys()
            ]
    return pd.DataFrame(rows, columns=["mode", "task", "coefficient", "target", "control"])


def _swept(run: Run, mode: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A mode's negations, with the keys of the main metrics of each task and the control set."""
    found = _negations(run, mode, [(task, "val", "0.0") for task in run.tasks])
    keys = {}
    for task in run.tasks:
        metrics, names = found[task]["val"]["0.0"], (f"{task}Val", f"{run.control}Val")
        keys[task] = [f"{name}:{main_metric(metrics, name) or 'top1'}" for name in names]
    needed = [(task, "val", "0.0", key) for task in run.tasks for key in keys[task]]
    return _negations(run, mode, needed), keys


def _negations(run: Run, mode: str, needed: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    path = arithmetic_path(run, mode, "negations")
    return complete_results(path, command("eval_task_negation", run, mode), needed)


def random_like(tau: State, seed: int, task: str) -> dict[str, torch.Tensor]:
    """Gaussian noise with the norm of tau in each weight, determined by (seed, task, name)."""
    noises = {}
    for name, value in tau.items():
        entropy = [seed, 17, *task.encode(), *name.encode()]
        draw = np.random.default_rng(entropy).standard_normal(tuple(value.shape), np.float32)
        noise = torch.from_numpy(np.asarray(draw))
        norm = noise.norm()
        noises[name] = noise * (value.norm() / norm) if norm > 0 else noise
    return noises


def against_random(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Negation of task vectors and of random vectors, on the test splits.

    Returns:
        Columns mode, vector ("task" or "random"), task, coefficient, target, control, zeroshot,
        zeroshot_control.
    """
    encoder, theta0_hash = zeroshot_encoder(run)
    singles = zeroshot_accuracies(run, theta0_hash)
    rows = []
    for mode in modes:
        negations = _negations(run, mode, [(task, key) for task in run.tasks for key in COLUMNS])
        base = base_encoder(encoder, mode)
        for task in run.tasks:
            tau = task_vector(run, task, mode, encoder, theta0_hash).vector
            noise = random_like(tau, run.seed, task)
            random = negate_task(run, task, noise, base, singles)
            for vector, result in (("task", negations[task]), ("random", random)):
                rows.append((mode, vector, task, *(result[key] for key in COLUMNS)))
    return pd.DataFrame(rows, columns=["mode", "vector", "task", *COLUMNS.values()])


def draw_curves(table: pd.DataFrame, run: Run) -> Any:
    """Accuracy on the negated task against that on the control set, mean of the tasks."""
    figure, axes = panels(1, 1, width=5.2, height=3.9)
    axis = axes[0][0]
    for mode in distinct(table["mode"]):
        own = table[table["mode"] == mode.name]
        means = own.groupby("coefficient")[["target", "control"]].mean()
        x, y = 100 * means["control"], 100 * means["target"]
        axis.plot(x, y, marker=mode.marker, ms=4, color=mode.colour, label=mode.label)
    start = 100 * table[table["coefficient"] == 0]["control"].mean()
    least = run.config.control_threshold * start
    axis.axvline(least, color=palette.CONTROL, ls=":", label=f"{least:.1f} %, the threshold")
    axis.set_xlabel(f"validation accuracy on {run.control} (control), %")
    axis.set_ylabel("validation accuracy on the negated task, %")
    axis.invert_xaxis()
    axis.legend()
    return figure


def draw_random(table: pd.DataFrame, run: Run) -> Any:
    """Test accuracy on the negated task and on the control set, by kind of vector."""
    figure, axes = panels(1, 2, width=4.2, height=3.4)
    modes = distinct(table["mode"])
    colours = [mode.colour for mode in modes]
    sides = (
        ("target", "zeroshot", "negated task"),
        ("control", "zeroshot_control", f"{run.control} (control)"),
    )
    for axis, (column, before, title) in zip(axes[0], sides, strict=True):
        for k, (vector, hatch) in enumerate(palette.HATCHES.items()):
            means = table[table["vector"] == vector].groupby("mode")[column].mean()
            places = [i + 0.4 * k - 0.2 for i in range(len(modes))]
            style = {"color": colours, "hatch": hatch, "edgecolor": "white"}
            axis.bar(places, 100 * means[[mode.name for mode in modes]], 0.38, **style)
            axis.bar(
                0, 0, color=palette.REFERENCE, hatch=hatch, ec="white", label=f"{vector} vector"
            )
        start = 100 * table[before].mean()
        axis.axhline(start, color=palette.ZEROSHOT, ls=":", label="zero-shot")
        named(axis, [mode.label for mode in modes])
        axis.set(title=title, ylabel="test accuracy, mean of the tasks, %", ylim=(0, 100))
    axes[0][0].legend(loc="upper right")
    return figure
