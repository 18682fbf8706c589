"""How merging methods degrade when task vectors are perturbed, with and without equal norms."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tangent_arithmetic.merging.algorithms import Algorithm, algorithm_class
from tangent_arithmetic.merging.methods import METHODS, get_method
from tangent_arithmetic.merging.perturbing import PERTURBATIONS, Subject, perturbations
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.merging.program import choose_scaling_factor, difference
from tangent_arithmetic.merging.stream import merged_state
from tangent_arithmetic.merging.taskpools import TaskPool
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)
Row = dict[str, Any]
PLUGINS: dict[str, list[str]] = {"plain": [], "normalised": ["normalise"]}
TITLES = {"plain": "Without normalisation", "normalised": "With norm normalisation"}
# lengths of a task vector that are tried, in multiples of its own
LONGER, SHORTER = np.arange(1.25, 3.01, 0.25), np.arange(0.1, 0.91, 0.1)
REFUSED = "refused"


def default_methods() -> list[str]:
    """The methods that merge any number of models with default options and without data."""
    return [
        name
        for name, method in METHODS.items()
        if method.num_models is None and not method.ordered and name != "weighted_average"
        if not method.needs_data
        if inspect.Parameter.empty not in method.defaults.values()
    ]


def confident_lengths(pool: ModelPool, tasks: TaskPool, task: str) -> dict[str, float]:
    """The lengths of a task vector at which its model is over- and under-confident.

    Confidence is the mean of the largest probability on the task's validation images; where these
    have several labels, that of the likelier answer to each label. A model is
    over-confident where it is highest beyond the length 1, and under-confident at the length below
    1 where it is nearest to the mean of that at 0 and at 1.

    Args:
        pool: the models, with the pre-trained one.
        tasks: has the task.
        task: the task, and the name of its model.

    Returns:
        {"over": length, "under": length}, in multiples of the task vector's own length.
    """
    encoder = tasks.encoder(pool, dict(pool.base.tensors))
    tau = difference(tasks.encoder(pool, dict(pool.weights(task).tensors)), encoder)
    lengths = [0.0, 1.0, *SHORTER.tolist(), *LONGER.tolist()]
    sums, number = np.zeros(len(lengths)), 0
    for i, logits, labels in tasks.logits(encoder, task, tau, lengths, validation=True):
        sums[i] += float(_confidences(logits, labels.ndim > 1).sum())
        number += len(logits) if i == 0 else 0
    confidence = sums / number
    shorter, longer = confidence[2 : 2 + len(SHORTER)], confidence[2 + len(SHORTER) :]
    middle = confidence[:2].mean()
    return {
        "over": float(LONGER[longer.argmax()]),
        "under": round(float(SHORTER[np.abs(shorter - middle).argmin()]), 2),
    }


def _confidences(logits: Tensor, multilabel: bool) -> Tensor:
    """The confidence of each answer (batch,), see `confident_lengths`."""
    if not multilabel:
        return logits.softmax(dim=1).amax(dim=1)
    return logits.abs().sigmoid().mean(dim=1)


def untuned(name: str, seed: int) -> Algorithm:
    """A method with default options."""
    method = get_method(name)
    options: dict[str, Any] = {"seed": seed} if "seed" in method.defaults else {}
    return algorithm_class(method.algorithm)(**options)


def tuned(name: str, pool: ModelPool, tasks: TaskPool, seed: int) -> Algorithm:
    """A method with default options, and its coefficient chosen on validation."""
    method, algorithm = get_method(name), untuned(name, seed)
    if method.coefficient is None:
        return algorithm
    at_one = algorithm.with_options(**{method.coefficient: 1.0})
    chosen = choose_scaling_factor(at_one, pool, tasks)
    return algorithm.with_options(**{method.coefficient: chosen["coefficient"]})


def accuracies(algorithm: Algorithm, pool: ModelPool, tasks: TaskPool) -> dict[str, float]:
    """Test accuracy of the merged model on the tasks whose models are in the pool."""
    encoder = tasks.encoder(pool, merged_state(algorithm.merge(pool)))
    return {
        name: tasks.measure(encoder, name, {}, [1.0], False)[0]["accuracy"]
        for name in tasks.tasks
        if name in pool.model_names
    }


def perturbed(
    algorithm: Algorithm, subject: Subject, label: str, tasks: TaskPool, clean: Mapping[str, float]
) -> Row:
    """What a perturbation does to a method.

    Args:
        algorithm: the method.
        subject: what is perturbed.
        label: a key of `PERTURBATIONS`.
        tasks: the tasks.
        clean: the accuracies without the perturbation.

    Returns:
        {"top1": accuracy by task, "lost": mean accuracy lost on these}, or {"refused": message}.
    """
    pool = ModelPool(PERTURBATIONS[label](subject), allow_base_mismatch=True)
    try:
        top1 = accuracies(algorithm, pool, tasks)
    except UsageError as error:
        return {REFUSED: str(error)}
    return {"top1": top1, "lost": float(np.mean([clean[task] - top1[task] for task in top1]))}


def stress(
    pool: ModelPool, tasks: TaskPool, methods: Sequence[str], task: str, seed: int = 0
) -> Row:
    """Merges perturbed task vectors by several methods and measures the accuracy that is lost.

    Coefficients are chosen on validation for the vectors as they are, once for a method, and stay.

    Args:
        pool: the models, with the pre-trained one; their names are those of tasks.
        tasks: the tasks, which need validation splits.
        methods: names of methods.
        task: the task whose model is perturbed, where it is a single one.
        seed: of random vectors and masks.

    Returns:
        {"task", "lengths", "methods": {method: {"options", "seconds", "plain" and "normalised":
        {"top1", "perturbed": {label: see `perturbed`}}}}}.

    Raises:
        UsageError: for an unknown method or task, or a method that cannot merge this pool.
    """
    for name in methods:
        if get_method(name).needs_data:
            raise UsageError(
                f"merge stress perturbs weights, and {name} merges by images of the tasks; "
                "expected methods that need none, such as task_arithmetic or tsv_m"
            )
        try:
            merged_state(untuned(name, seed).merge(pool))
        except UsageError as error:
            raise UsageError(f"{name} cannot merge these models; leave it out: {error}") from error
    subject = Subject(pool, task, confident_lengths(pool, tasks, task), seed)
    rows: dict[str, Row] = {}
    for name in methods:
        begun, algorithm = time.monotonic(), tuned(name, pool, tasks, seed)
        row: Row = {"options": algorithm.options}
        for key, plugins in PLUGINS.items():
            own = type(algorithm)(**algorithm.options, plugins=plugins)
            clean = accuracies(own, pool, tasks)
            labels = perturbations(len(pool.model_names))
            found = {label: perturbed(own, subject, label, tasks, clean) for label in labels}
            row[key] = {"top1": clean, "perturbed": found}
        row["seconds"] = round(time.monotonic() - begun, 1)
        rows[name] = row
        logger.info("%s: %.1f s", name, row["seconds"])
    return {"task": task, "lengths": dict(subject.lengths), "methods": rows}


def points(value: float) -> str:
    """A share in percentage points, without the sign of a zero."""
    return f"{round(100 * value, 1) + 0.0:.1f}"


def tables(found: Mapping[str, Any]) -> str:
    """The accuracy lost by method and perturbation in percentage points, in two tables."""
    every = found["methods"].values()
    labels = dict.fromkeys(label for row in every for label in row["plain"]["perturbed"])
    header = ["method", "accuracy, %", *labels]
    parts = []
    for key, title in TITLES.items():
        lines = []
        for name, row in found["methods"].items():
            clean, cells = row[key]["top1"], row[key]["perturbed"].values()
            lost = [REFUSED if REFUSED in cell else points(cell["lost"]) for cell in cells]
            lines.append([name, points(np.mean(list(clean.values()))), *lost])
        parts.append(f"## {title}\n\n{markdown_table(header, lines)}\n")
    return "\n".join(parts)
