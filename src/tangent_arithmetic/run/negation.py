"""The negation of a task of a run, with the run's splits, control set and zero-shot accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.negation import negate
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.run.models import command, split_of
from tangent_arithmetic.run.results import accuracies_path, require_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import State


def negate_task(
    run: Run, task: str, tau: State, base: Encoder, singles: Mapping[str, float]
) -> dict[str, Any]:
    """The negation of one task's vector, see `arithmetic.negation.negate`.

    The control set keeps `--control-threshold` of its zero-shot accuracy.

    Args:
        run: the run.
        task: the task to forget.
        tau: a vector to negate, by name.
        base: the pre-trained encoder, linearised or not.
        singles: its zero-shot accuracies, by data set.

    Returns:
        What `negate` gives, and "zeroshot", "zeroshot_control".
    """
    control = run.control
    names = (f"{task}Val", f"{control}Val", task, control)
    task_val, control_val, on_task, on_control = (split_of(run, base, name) for name in names)
    found = negate(
        base,
        tau,
        (task_val, control_val),
        (on_task, on_control),
        run.config.control_threshold * singles[f"{control}Val"],
        coefficients(run.config.n_eval_points),
    )
    return {**found, "zeroshot": singles[task], "zeroshot_control": singles[control]}


def zeroshot_needed(run: Run) -> list[str]:
    """The data sets whose zero-shot accuracies negations need.

    Raises:
        UsageError: if one of the tasks is the control set.
    """
    if run.control in run.tasks:
        raise UsageError(
            f"--tasks names {run.control}, which is the control set; leave it out, or name another "
            "one with --control-dataset"
        )
    return [*run.tasks, run.control, f"{run.control}Val"]


def zeroshot_accuracies(run: Run, theta0_hash: str) -> dict[str, Any]:
    """The zero-shot accuracies that negations need, from the run's results."""
    made_by = command("eval_single_task", run, "none")
    path = accuracies_path(run, "none")
    return require_results(path, run, theta0_hash, made_by, needed=zeroshot_needed(run))
