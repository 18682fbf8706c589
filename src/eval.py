"""Evaluation with the signatures of the public projects; `args` are settings, see `Run.of`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tangent_arithmetic.arithmetic.coefficients import coefficients, find_optimal_coef
from tangent_arithmetic.arithmetic.metrics import nonlinear_advantage, normalized
from tangent_arithmetic.arithmetic.sweeps import sweep_splits
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, Source, TaskVector
from tangent_arithmetic.encoders.base import Encoder, is_encoder
from tangent_arithmetic.encoders.linearized import linearized, standard
from tangent_arithmetic.run.models import load_encoder, split_of
from tangent_arithmetic.run.run import Run

__all__ = [
    "add_normalized_accuracy",
    "eval_single_dataset",
    "evaluate",
    "evaluate_task_vector",
    "evaluate_task_vector_at_coef",
    "find_optimal_coef",
    "nonlinear_advantage",
]


def eval_single_dataset(image_encoder: Encoder, dataset_name: str, args: Any) -> dict[str, Any]:
    """{"top1", "balanced", "num_images"} of an encoder on X (test split) or XVal (validation).

    A set with several labels an image has "map", mean average precision.
    """
    split = split_of(Run.of(args), image_encoder, dataset_name)
    return {**split.accuracy(image_encoder)}


def evaluate(image_encoder: Encoder, args: Any) -> dict[str, float]:
    """{"<data set>:top1"} on `args.eval_datasets` and on `args.control_dataset`, if set.

    With the further metrics of each set, see `eval_single_dataset`.
    """
    run = Run.of(args)
    return {
        f"{name}:{metric}": value
        for name in run.evaluated
        for metric, value in eval_single_dataset(image_encoder, name, run).items()
        if metric != "num_images"
    }


def evaluate_task_vector_at_coef(
    task_vector: TaskVector,
    pretrained_checkpoint: Source,
    args: Any,
    scaling_coef: float,
    posthoc_linearization: bool = False,
) -> dict[str, float]:
    """Metrics at one coefficient, see `evaluate_task_vector`."""
    coefs = [scaling_coef]
    results = _sweep(task_vector, pretrained_checkpoint, args, coefs, posthoc_linearization)
    return results[scaling_coef]


def evaluate_task_vector(
    task_vector: TaskVector,
    pretrained_checkpoint: Source,
    args: Any,
    posthoc_linearization: bool = False,
) -> dict[str, dict[str, float]]:
    """Metrics at `args.n_eval_points` coefficients from 0 to 1, keyed by short decimals.

    Normalised ones are added where `args.finetuning_accuracies` are set.
    """
    coefs = coefficients(Run.of(args).config.n_eval_points)
    results = _sweep(task_vector, pretrained_checkpoint, args, coefs, posthoc_linearization)
    return {str(coef): metrics for coef, metrics in results.items()}


def add_normalized_accuracy(results: Mapping[str, float], args: Any) -> dict[str, float]:
    """The results with accuracies divided by `args.finetuning_accuracies`, see `normalized`."""
    return normalized(results, Run.of(args).config.finetuning_accuracies)


def _sweep(
    task_vector: TaskVector, start: Source, args: Any, coefs: Sequence[float], posthoc: bool
) -> dict[float, dict[str, float]]:
    run = Run.of(args)
    base = _base(start, posthoc or isinstance(task_vector, LinearizedTaskVector))
    splits = [split_of(run, base, name) for name in run.evaluated]
    results = sweep_splits(base, task_vector.vector, coefs, splits)
    return {coef: add_normalized_accuracy(metrics, run) for coef, metrics in results.items()}


def _base(start: Source, linear: bool) -> Encoder:
    """The pre-trained encoder to edit, linearised or not."""
    if isinstance(start, str | Path):
        return load_encoder(start, linear)
    if not is_encoder(start):
        raise TypeError(f"expected an image encoder, got {type(start).__name__}")
    return linearized(start) if linear else standard(start)
