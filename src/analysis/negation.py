"""Negation: what forgetting costs, and whether any vector of that length would do.

A random vector has, in each weight, the norm of the task vector there. It is negated, and its
coefficient chosen, like the task vector.

Source: arXiv:2212.04089, the negation experiments and their random-vector baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from src.analysis.edits import MODES
from src.analysis.figures import COLOURS, LABELS, MARKERS, panels
from src.eval_task_negation import negate, zeroshot_needed
from src.results import accuracies_path, arithmetic_path, found_results, require_results
from src.runs import command, task_vector, zeroshot_encoder
from src.settings import control_of, seed_of, setting, tasks_of
from src.statedict import State

KEYS = ("coefficient", "test", "test_control", "zeroshot", "zeroshot_control")  # of a negation


def curves(args: Any, modes: Sequence[str] = MODES) -> pd.DataFrame:
    """Validation accuracies on the way of negation, from the files of results.

    Returns:
        Columns mode, task, coefficient, target and control (accuracies).
    """
    control = control_of(args)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        needed = [
            (task, "val", "0.0", f"{name}Val:top1")
            for task in tasks_of(args)
            for name in (task, control)
        ]
        found = _negations(args, mode, needed)
        rows += [
            {
                "mode": mode, "task": task, "coefficient": float(coef),
                "target": metrics[f"{task}Val:top1"], "control": metrics[f"{control}Val:top1"],
            }
            for task in tasks_of(args)
            for coef, metrics in found[task]["val"].items()
            if {f"{task}Val:top1", f"{control}Val:top1"} <= metrics.keys()
        ]  # fmt: skip
    return pd.DataFrame(rows)


def _negations(args: Any, mode: str, needed: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    path = arithmetic_path(args, mode, "negations")
    return found_results(path, command("eval_task_negation", args, mode), needed)


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


def against_random(args: Any, modes: Sequence[str] = MODES) -> pd.DataFrame:
    """Negation of task vectors and of random vectors, on the test splits.

    Returns:
        Columns mode, vector ("task" or "random"), task, coefficient, target, control, zeroshot,
        zeroshot_control.
    """
    encoder, theta0_hash = zeroshot_encoder(args)
    made_by = command("eval_single_task", args, "none")
    path, needed = accuracies_path(args, "none"), zeroshot_needed(args)
    singles = require_results(path, args, theta0_hash, made_by, needed=needed)
    rows: list[dict[str, Any]] = []
    for mode in modes:
        known = _negations(args, mode, [(task, key) for task in tasks_of(args) for key in KEYS])
        own = copy.copy(args)
        own.finetuning_mode = mode
        for task in tasks_of(args):
            tau = task_vector(own, task, mode, encoder, theta0_hash)
            noise = type(tau)(vector=random_like(tau.vector, seed_of(args), task))
            found = {"task": known[task], "random": negate(own, task, noise, encoder, singles)}
            rows += [_row(mode, vector, task, one) for vector, one in found.items()]
    return pd.DataFrame(rows)


def _row(mode: str, vector: str, task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mode": mode, "vector": vector, "task": task, "coefficient": found["coefficient"],
        "target": found["test"], "control": found["test_control"],
        "zeroshot": found["zeroshot"], "zeroshot_control": found["zeroshot_control"],
    }  # fmt: skip


def draw_curves(found: pd.DataFrame, args: Any) -> Any:
    """Accuracy on the task against that on the control set, mean of the tasks."""
    figure, axes = panels(1, 1, width=5.2, height=3.9)
    axis = axes[0][0]
    for mode in (m for m in MODES if m in set(found["mode"])):
        means = found[found["mode"] == mode].groupby("coefficient")[["target", "control"]].mean()
        axis.plot(
            100 * means["control"], 100 * means["target"], marker=MARKERS[mode], ms=4,
            color=COLOURS[mode], label=LABELS[mode],
        )  # fmt: skip
    start = 100 * found[found["coefficient"] == 0]["control"].mean()
    least = setting(args, "control_threshold") * start
    axis.axvline(least, color="#999999", ls=":", label=f"{least:.1f} %, the least that is allowed")
    axis.set(
        xlabel=f"validation accuracy on {control_of(args)} (control), %",
        ylabel="validation accuracy on the negated task, %",
    )
    axis.invert_xaxis()
    axis.legend(frameon=False, fontsize=8)
    return figure


def draw_random(found: pd.DataFrame, args: Any) -> Any:
    """Test accuracy on the negated task and on the control set, for each kind of vector."""
    figure, axes = panels(1, 2, width=4.2, height=3.4)
    modes = [m for m in MODES if m in set(found["mode"])]
    for axis, (column, before, title) in zip(
        axes[0],
        (
            ("target", "zeroshot", "negated task"),
            ("control", "zeroshot_control", f"{control_of(args)} (control)"),
        ),
        strict=True,
    ):
        for k, (vector, hatch) in enumerate((("task", ""), ("random", "///"))):
            means = found[found["vector"] == vector].groupby("mode")[column].mean()
            axis.bar(
                [i + 0.4 * k - 0.2 for i in range(len(modes))], 100 * means[modes], 0.38,
                color=[COLOURS[m] for m in modes], hatch=hatch, edgecolor="white",
                label=f"{vector} vector",
            )  # fmt: skip
        axis.axhline(100 * found[before].mean(), color="#333333", ls=":", label="zero-shot")
        axis.set_xticks(range(len(modes)), [LABELS[m] for m in modes])
        axis.set(title=title, ylabel="test accuracy, mean of the tasks, %", ylim=(0, 100))
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper right")
    return figure
