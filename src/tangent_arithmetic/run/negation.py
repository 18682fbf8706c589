"""The negation of a task of a run, with the run's splits, control set and zero-shot accuracies."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import coefficients, least_kept
from tangent_arithmetic.arithmetic.metrics import main_key, main_metric, normalized
from tangent_arithmetic.arithmetic.negation import negate
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.run.heads import evaluated_on
from tangent_arithmetic.run.models import command, split_of
from tangent_arithmetic.run.results import accuracies_path, require_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.statedict import State

logger = logging.getLogger(__name__)


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
        least_kept(run.config.control_threshold, singles[f"{control}Val"]),
        coefficients(run.config.n_eval_points),
    )
    return {**found, "zeroshot": singles[task], "zeroshot_control": singles[control]}


def origin_of(run: Run) -> dict[str, Any]:
    """What negations are evaluated with, for provenance: see `evaluated_on`; and the condition."""
    names = [f"{name}{end}" for name in (*run.tasks, run.control) for end in ("Val", "")]
    condition = {"name": run.control, "threshold": run.config.control_threshold}
    return {**evaluated_on(run, names), "control": condition}


def with_means(
    results: Mapping[str, dict[str, Any]], finetuned: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Negations whose validation metrics have the further keys of the public projects.

    Args:
        results: what `negate_task` gives, by task.
        finetuned: accuracies of the mode's single tasks, by data set; may be empty.

    Returns:
        The same, with "avg_top1" and, where the task's fine-tuned accuracy is known,
        "<task>Val:normalized_top1" and "avg_normalized_top1" at each coefficient. The means are
        over the negated task alone.
    """
    extended = {}
    for task, found in results.items():
        name = f"{task}Val"
        own = {name: finetuned[name]} if name in finetuned else {}
        val = {c: _extended(metrics, name, own) for c, metrics in found["val"].items()}
        extended[task] = {**found, "val": val}
    return extended


def _extended(
    metrics: Mapping[str, float], name: str, own: Mapping[str, float]
) -> dict[str, float]:
    mean = {"avg_top1": metrics[main_key(metrics, name)]} if main_metric(metrics, name) else {}
    return {**normalized(metrics, own), **mean}


def finetuned_accuracies(
    run: Run, theta0_hash: str, checkpoints: Mapping[str, str]
) -> dict[str, float]:
    """Accuracies of the mode's single tasks, if they have been evaluated; otherwise empty."""
    path, mode = accuracies_path(run, run.mode.name), run.mode.name
    made_by = command("eval_single_task", run, mode)
    try:
        return require_results(path, run, theta0_hash, made_by, checkpoints)
    except MissingFileError:
        return {}
    except UsageError as error:
        logger.warning("negations are not normalised: %s", error)
        return {}


def zeroshot_needed(run: Run) -> list[str]:
    """The data sets whose zero-shot accuracies negations need."""
    return [*run.tasks, run.control, f"{run.control}Val"]


def zeroshot_accuracies(run: Run, theta0_hash: str) -> dict[str, Any]:
    """The zero-shot accuracies that negations need, from the run's results."""
    made_by = command("eval_single_task", run, "none")
    path = accuracies_path(run, "none")
    return require_results(path, run, theta0_hash, made_by, needed=zeroshot_needed(run))
