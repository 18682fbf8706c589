r"""Evaluation: top-1 accuracy, sweeps over coefficients, the choice of the coefficient.

For a linear model a whole sweep costs one pass, since its features are affine in the coefficient
(`src/features.py`). For a standard model each image is read and moved once, and meets the weights
of every coefficient.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import ddp, statedict
from src.data.loading import to_device
from src.data.registry import eval_batches, evaluated
from src.errors import UsageError
from src.features import linear_features
from src.heads import get_classification_head
from src.linearize import LinearizedImageEncoder
from src.logs import progress
from src.modeling import ImageEncoder
from src.settings import (
    autocast_of,
    device_of,
    eval_datasets,
    setting,
)
from src.task_vectors import LinearizedTaskVector, Source, TaskVector

logger = logging.getLogger(__name__)

Encoder = ImageEncoder | LinearizedImageEncoder
HELD_BYTES = 256 * 2**20  # images that a sweep over coefficients keeps on the device
FEW = 100  # pictures of a split below which one of them is more than a percent


def coefficients(num_points: int) -> list[float]:
    """`num_points` coefficients from 0 to 1, evenly spaced, as short decimals."""
    return [round(float(c), 10) for c in np.linspace(0.0, 1.0, num_points)]


def _accuracies(counts: Tensor) -> list[dict[str, float]]:
    """Top-1 of each feature set, of counts of hits and, last, of images, over all ranks."""
    *correct, total = ddp.all_sum(counts).tolist()
    return [{"top1": hit / total, "num_images": total} for hit in correct]


def _hits(head: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """How many images of a batch get their label."""
    return (head(features.float()).argmax(dim=1) == labels).sum()


@torch.no_grad()
def _linear_accuracies(
    encoder: LinearizedImageEncoder,
    vectors: Sequence[statedict.State],
    coefs: Sequence[Sequence[float]],
    dataset_name: str,
    args: Any,
) -> list[dict[str, float]]:
    """Top-1 at theta0 + sum_t coefs[i][t] * vectors[t] for each i, from one pass over images."""
    device = device_of(args)
    head = get_classification_head(args, dataset_name).to(device)
    found = linear_features(encoder, vectors, dataset_name, args).to(device)
    counts = torch.zeros(len(coefs) + 1, dtype=torch.int64, device=device)
    if len(found.labels):
        counts[:-1] = torch.stack([_hits(head, found.at(c), found.labels) for c in coefs])
        counts[-1] = len(found.labels)
    return _accuracies(counts)


@torch.no_grad()
def _nonlinear_accuracies(
    encoder: ImageEncoder,
    tau: statedict.State,
    coefs: Sequence[float],
    dataset_name: str,
    args: Any,
) -> list[dict[str, float]]:
    """Top-1 at theta + coef * tau for each coefficient; each image is read and moved once.

    As many batches as `HELD_BYTES` allows meet a coefficient in a row, so that its weights are
    computed once for them.
    """
    device = device_of(args)
    encoder.eval().to(device)
    head = get_classification_head(args, dataset_name).to(device)
    own = encoder.weights()
    theta = {name: value.clone() for name, value in own.items()} if tau else own
    tau = {name: value.to(device) for name, value in tau.items()}
    statedict.check_part(own, tau, "theta and tau")
    counts = torch.zeros(len(coefs) + 1, dtype=torch.int64, device=device)
    loader = eval_batches(args, dataset_name, encoder.val_preprocess)

    def meetings() -> Iterator[tuple[int, Tensor, Tensor]]:
        for batches in held_batches(loader, device):
            for i, coef in enumerate(coefs):
                statedict.move_into(own, theta, tau, coef)
                for images, labels in batches:
                    yield i, images, labels

    total = len(loader) * len(coefs)
    try:
        for i, images, labels in progress(meetings(), f"evaluating {dataset_name}", total):
            with autocast_of(args):
                features = encoder(images)
            counts[i] += _hits(head, features, labels)
            counts[-1] += len(labels) if i == 0 else 0
    finally:
        if tau:
            encoder.load_weights(theta)
    return _accuracies(counts)


def held_batches(
    loader: Iterable[Sequence[Tensor]], device: torch.device
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches on the device, as many at a time as `HELD_BYTES` allows."""
    held: list[tuple[Tensor, Tensor]] = []
    size = 0
    for batch in loader:
        held.append(to_device(batch, device))
        size += held[-1][0].nbytes
        if size + held[-1][0].nbytes > HELD_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def eval_single_dataset(image_encoder: Encoder, dataset_name: str, args: Any) -> dict[str, float]:
    """Top-1 accuracy of an encoder, with the zero-shot head, on one data set.

    Args:
        image_encoder: standard or linearised.
        dataset_name: X for the test split, XVal for the validation split.
        args: settings.

    Returns:
        {"top1": accuracy in [0, 1], "num_images": images}.
    """
    if isinstance(image_encoder, LinearizedImageEncoder):
        tau = image_encoder.displacement()
        return _linear_accuracies(image_encoder, [tau], [[1.0]], dataset_name, args)[0]
    return _nonlinear_accuracies(image_encoder, {}, [0.0], dataset_name, args)[0]


def sweep_dataset(
    encoder: Encoder,
    tau: statedict.State,
    coefs: Sequence[float],
    dataset_name: str,
    args: Any,
) -> list[float]:
    """Top-1 accuracies at theta + coef * tau for each coefficient.

    Args:
        encoder: at theta; standard or linearised. Unchanged at the end.
        tau: the task vector.
        coefs: the coefficients.
        dataset_name: X for the test split, XVal for the validation split.
        args: settings.
    """
    if isinstance(encoder, LinearizedImageEncoder):
        start = encoder.displacement()
        moved = any(bool(step.any()) for step in start.values())
        vectors = [start, tau] if moved else [tau]
        points = [[1.0, coef] if moved else [coef] for coef in coefs]
        results = _linear_accuracies(encoder, vectors, points, dataset_name, args)
    else:
        results = _nonlinear_accuracies(encoder, tau, coefs, dataset_name, args)
    return [result["top1"] for result in results]


def evaluate(image_encoder: Encoder, args: Any) -> dict[str, float]:
    """Top-1 on every data set of `args.eval_datasets` and on `args.control_dataset`, if set.

    Returns:
        {"<data set>:top1": accuracy}.
    """
    return {
        f"{name}:top1": eval_single_dataset(image_encoder, name, args)["top1"]
        for name in _evaluated(args)
    }


def _evaluated(args: Any) -> list[str]:
    control, names = setting(args, "control_dataset"), eval_datasets(args)
    if control in names:
        raise UsageError(
            f"--control-dataset={control} is one of the data sets that are evaluated anyway; leave "
            "it out of one of them"
        )
    return [*names, *([control] if control else [])]


def load_base(pretrained_checkpoint: Source, linear: bool) -> Encoder:
    """The pre-trained encoder to edit, linearised or not."""
    if isinstance(pretrained_checkpoint, ImageEncoder | LinearizedImageEncoder):
        ready = isinstance(pretrained_checkpoint, LinearizedImageEncoder) == linear
        empty = TaskVector(vector={})
        if ready:
            return pretrained_checkpoint
        return (empty.apply_to_linear if linear else empty.apply_to_nonlinear)(
            pretrained_checkpoint
        )
    if isinstance(pretrained_checkpoint, nn.Module | Mapping):
        raise TypeError(f"expected an image encoder, got {type(pretrained_checkpoint).__name__}")
    return (LinearizedImageEncoder if linear else ImageEncoder).load(pretrained_checkpoint)


def sweep(
    task_vector: TaskVector,
    pretrained_checkpoint: Source,
    args: Any,
    coefs: Sequence[float],
    posthoc_linearization: bool = False,
) -> dict[float, dict[str, float]]:
    """Metrics on the evaluated data sets (see `evaluate`) at each coefficient.

    Returns:
        coefficient -> {"<data set>:top1", and with `args.finetuning_accuracies` normalised ones}.
    """
    linear = posthoc_linearization or isinstance(task_vector, LinearizedTaskVector)
    base = load_base(pretrained_checkpoint, linear)
    metrics: dict[float, dict[str, float]] = {coef: {} for coef in coefs}
    for name in _evaluated(args):
        for coef, top1 in zip(
            coefs, sweep_dataset(base, task_vector.vector, coefs, name, args), strict=True
        ):
            metrics[coef][f"{name}:top1"] = top1
    return {coef: add_normalized_accuracy(found, args) for coef, found in metrics.items()}


def evaluate_task_vector_at_coef(
    task_vector: TaskVector,
    pretrained_checkpoint: Source,
    args: Any,
    scaling_coef: float,
    posthoc_linearization: bool = False,
) -> dict[str, float]:
    """Metrics at one coefficient, see `sweep`."""
    return sweep(task_vector, pretrained_checkpoint, args, [scaling_coef], posthoc_linearization)[
        scaling_coef
    ]


def evaluate_task_vector(
    task_vector: TaskVector,
    pretrained_checkpoint: Source,
    args: Any,
    posthoc_linearization: bool = False,
) -> dict[str, dict[str, float]]:
    """Metrics at `args.n_eval_points` coefficients from 0 to 1, keyed by short decimals."""
    coefs = coefficients(setting(args, "n_eval_points"))
    found = sweep(task_vector, pretrained_checkpoint, args, coefs, posthoc_linearization)
    return {str(coef): metrics for coef, metrics in found.items()}


@functools.cache  # once, not at every coefficient
def _warn_of_zero(names: str) -> None:
    logger.warning("fine-tuned accuracy is 0, so that there is no normalised one: %s", names)


def add_normalized_accuracy(results: Mapping[str, float], args: Any) -> dict[str, float]:
    """The results with top-1 also divided by `args.finetuning_accuracies`, and both averaged.

    A data set without a fine-tuned accuracy (the control set) is left out of the averages; one
    whose fine-tuned accuracy is 0, where the quotient is not defined, of the normalised ones.
    """
    references = setting(args, "finetuning_accuracies") or {}
    tasks = [name for name in references if f"{name}:top1" in results]
    learned = [name for name in tasks if references[name]]
    if tasks != learned:
        _warn_of_zero(", ".join(name for name in tasks if not references[name]))
    added = dict(results)
    for name in learned:
        added[f"{name}:normalized_top1"] = results[f"{name}:top1"] / references[name]
    for kind, names in (("top1", tasks), ("normalized_top1", learned)):
        if tasks:
            values = [added[f"{name}:{kind}"] for name in names]
            added[f"avg_{kind}"] = float(np.mean(values)) if values else 0.0
    return added


def find_optimal_coef(
    results: Mapping[str, Mapping[str, float]] | Mapping[float, Mapping[str, float]],
    metric: str = "avg_normalized_top1",
    minimize: bool = False,
    control_metric: str | None = None,
    control_metric_threshold: float = 0.0,
    num_images: int | None = None,
) -> float:
    """The coefficient with the best metric among those that keep the control metric.

    Ties go to the smallest coefficient; a warning says so where it is 0 or the split is tiny, see
    `warn_of_ties`. If none qualifies the answer is 0, the pre-trained model, and a warning says so.

    Args:
        results: coefficient -> metrics; keys may be numbers or their texts.
        metric: what to optimise.
        minimize: whether lower is better.
        control_metric: metric that must reach the threshold; None for no condition.
        control_metric_threshold: least value of the control metric.
        num_images: pictures of the smallest split that the metrics are of, if that is known.
    """
    best = best_coefs(results, metric, minimize, control_metric, control_metric_threshold)
    if not best:
        logger.warning(
            "no coefficient keeps %s at %.4f or more; taking 0, the pre-trained model",
            control_metric,
            control_metric_threshold,
        )
        return 0.0
    warn_of_ties([best], num_images, metric)
    return best[0]


def best_coefs(
    results: Mapping[str, Mapping[str, float]] | Mapping[float, Mapping[str, float]],
    metric: str,
    minimize: bool = False,
    control_metric: str | None = None,
    control_metric_threshold: float = 0.0,
) -> list[float]:
    """All coefficients with the best metric, in order; arguments as `find_optimal_coef`."""
    sign = 1.0 if minimize else -1.0
    qualified = [
        (sign * found[metric], float(coef))
        for coef, found in results.items()
        if control_metric is None or found[control_metric] >= control_metric_threshold
    ]
    best = min(qualified, default=(0.0, 0.0))[0]
    return sorted(coef for value, coef in qualified if value == best)


def warn_of_ties(chosen: Sequence[Sequence[float]], num_images: int | None, what: str) -> None:
    """Warns, once, of coefficients that were the smallest of several equally good ones.

    That is worth knowing where it is 0, which is no edit at all, or where the split is so small
    that many coefficients must tie.

    Args:
        chosen: for each choice the coefficients with the best value, see `best_coefs`.
        num_images: pictures of the smallest split that they were chosen on, if that is known.
        what: what was chosen by, for the message.
    """
    tiny = num_images is not None and num_images < FEW
    ties = [tied for tied in chosen if len(tied) > 1 and (tied[0] == 0 or tiny)]
    if not ties or not ddp.is_main_process():
        return
    size = "" if num_images is None else f" on {num_images} pictures"
    if len(chosen) == 1:
        model = ", the pre-trained model" if ties[0][0] == 0 else ""
        logger.warning(
            "%s: %d coefficients, %g to %g, tie for the best value%s; taking the smallest, %g%s",
            what, len(ties[0]), ties[0][0], ties[0][-1], size, ties[0][0], model,
        )  # fmt: skip
        return
    logger.warning(
        "%s: in %d of %d choices several coefficients tie for the best value%s; the smallest is "
        "taken, in %d of them 0, the pre-trained model",
        what, len(ties), len(chosen), size, sum(tied[0] == 0 for tied in ties),
    )  # fmt: skip


def smallest_split(args: Any, names: Iterable[str]) -> int:
    """The number of pictures of the smallest of these splits, as they are evaluated."""
    return min(len(evaluated(args, name).test) for name in names)


def nonlinear_advantage(acc_linear: float, acc_nonlinear: float, num_classes: int) -> float:
    r"""Normalised gap between the error rates of linear and standard fine-tuning.

    \[ \frac{e_{lin} - e_{nl}}{1 - 1/C} \]

    with the error rates \(e = 1 - acc\) and the error rate of guessing among C classes.

    Args:
        acc_linear: accuracy of linear fine-tuning, in [0, 1].
        acc_nonlinear: accuracy of standard fine-tuning, in [0, 1].
        num_classes: C.

    Source: the definition used by the code of arXiv:2305.12827.
    """
    return (acc_nonlinear - acc_linear) / (1.0 - 1.0 / num_classes)
