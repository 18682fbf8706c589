"""Negation: what forgetting costs, and whether any vector of that length would do.

A random vector has, in each weight, the norm of the task vector there. It is negated, and its
coefficient chosen, like the task vector.

Source: arXiv:2212.04089, the negation experiments and their random-vector baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from tangent_arithmetic.analysis.figures import panels
from tangent_arithmetic.run.models import base_encoder, command, task_vector, zeroshot_encoder
from tangent_arithmetic.run.modes import MODES, in_order
from tangent_arithmetic.run.negation import negate_task, zeroshot_accuracies
from tangent_arithmetic.run.results import (
    arithmetic_path,
    found_results,
)
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.statedict import State

KEYS = ("coefficient", "test", "test_control", "zeroshot", "zeroshot_control")  # of a negation


def curves(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Validation accuracies on the way of negation, from the files of results.

    Returns:
        Columns mode, task, coefficient, target and control (accuracies).
    """
    control = run.control
    rows: list[dict[str, Any]] = []
    for mode in modes:
        needed = [
            (task, "val", "0.0", f"{name}Val:top1")
            for task in run.tasks
            for name in (task, control)
        ]
        found = _negations(run, mode, needed)
        rows += [
            {
                "mode": mode, "task": task, "coefficient": float(coef),
                "target": metrics[f"{task}Val:top1"], "control": metrics[f"{control}Val:top1"],
            }
            for task in run.tasks
            for coef, metrics in found[task]["val"].items()
            if {f"{task}Val:top1", f"{control}Val:top1"} <= metrics.keys()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _negations(run: Run, mode: str, needed: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    path = arithmetic_path(run, mode, "negations")
    return found_results(path, command("eval_task_negation", run, mode), needed)


def random_like(tau: State, seed: int, task: str) -> dict[str, torch.Tensor]:
    """Gaussian noise with the norm of tau in each weight, a function of (seed, task, name)."""
    found = {}
    for name, value in tau.items():
        entropy = [seed, 17, *task.encode(), *name.encode()]
        draw = np.random.default_rng(entropy).standard_normal(tuple(value.shape), np.float32)
        noise = torch.from_numpy(np.asarray(draw))
        norm = noise.norm()
        found[name] = noise * (value.norm() / norm) if norm > 0 else noise
    return found


def against_random(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Negation of task vectors and of random vectors, on the test splits.

    Returns:
        Columns mode, vector ("task" or "random"), task, coefficient, target, control, zeroshot,
        zeroshot_control.
    """
    encoder, theta0_hash = zeroshot_encoder(run)
    singles = zeroshot_accuracies(run, theta0_hash)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        known = _negations(run, mode, [(task, key) for task in run.tasks for key in KEYS])
        base = base_encoder(encoder, mode)
        for task in run.tasks:
            tau = task_vector(run, task, mode, encoder, theta0_hash).vector
            noise = random_like(tau, run.seed, task)
            found = {"task": known[task], "random": negate_task(run, task, noise, base, singles)}
            rows += [_row(mode, vector, task, one) for vector, one in found.items()]
    return pd.DataFrame(rows)


def _row(mode: str, vector: str, task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mode": mode, "vector": vector, "task": task, "coefficient": found["coefficient"],
        "target": found["test"], "control": found["test_control"],
        "zeroshot": found["zeroshot"], "zeroshot_control": found["zeroshot_control"],
    }  # fmt: skip


def draw_curves(found: pd.DataFrame, run: Run) -> Any:
    """Accuracy on the task against that on the control set, mean of the tasks."""
    figure, axes = panels(1, 1, width=5.2, height=3.9)
    axis = axes[0][0]
    for mode in in_order(found["mode"]):
        means = found[found["mode"] == mode].groupby("coefficient")[["target", "control"]].mean()
        axis.plot(
            100 * means["control"], 100 * means["target"], marker=MODES[mode].marker, ms=4,
            color=MODES[mode].colour, label=MODES[mode].label,
        )  # fmt: skip
    start = 100 * found[found["coefficient"] == 0]["control"].mean()
    least = run.config.control_threshold * start
    axis.axvline(least, color="#999999", ls=":", label=f"{least:.1f} %, the least that is allowed")
    axis.set(
        xlabel=f"validation accuracy on {run.control} (control), %",
        ylabel="validation accuracy on the negated task, %",
    )
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_random(found: pd.DataFrame, run: Run) -> Any:
    """Test accuracy on the negated task and on the control set, for each kind of vector."""
    figure, axes = panels(1, 2, width=4.2, height=3.4)
    modes = in_order(found["mode"])
    for axis, (column, before, title) in zip(
        axes[0],
        (
            ("target", "zeroshot", "negated task"),
            ("control", "zeroshot_control", f"{run.control} (control)"),
        ),
        strict=True,
    ):
        for k, (vector, hatch) in enumerate((("task", ""), ("random", "///"))):
            means = found[found["vector"] == vector].groupby("mode")[column].mean()
            axis.bar(
                [i + 0.4 * k - 0.2 for i in range(len(modes))], 100 * means[modes], 0.38,
                color=[MODES[m].colour for m in modes], hatch=hatch, edgecolor="white",
                label=f"{vector} vector",
            )  # fmt: skip
        axis.axhline(100 * found[before].mean(), color="#333333", ls=":", label="zero-shot")
        axis.set_xticks(range(len(modes)), [MODES[m].label for m in modes])
        axis.set(title=title, ylabel="test accuracy, mean of the tasks, %", ylim=(0, 100))
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper right")
    return figure
