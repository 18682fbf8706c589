r"""Evaluation: top-1 accuracy, sweeps over coefficients, the choice of the coefficient.

For a linear model a whole sweep costs one pass, since its features are affine in the coefficient:
\(f_{lin}(x; \theta_0 + \alpha \tau) = f_0(x) + \alpha J \tau\). For a standard model each batch is
read and moved once, and meets the weights of every coefficient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from src import ddp, statedict
from src.data.loading import eval_loader, to_device
from src.data.registry import dataset_for
from src.heads import get_classification_head
from src.linearize import LinearizedImageEncoder
from src.logs import progress
from src.modeling import ImageEncoder
from src.settings import (
    device_of,
    eval_datasets,
    num_workers_of,
    setting,
)
from src.task_vectors import Source, TaskVector

logger = logging.getLogger(__name__)

Encoder = ImageEncoder | LinearizedImageEncoder
EVAL_BATCH = 256


def coefficients(num_points: int) -> list[float]:
    """`num_points` coefficients from 0 to 1, evenly spaced, as short decimals."""
    return [round(float(c), 10) for c in np.linspace(0.0, 1.0, num_points)]


def _loader(encoder: Encoder, dataset_name: str, args: Any) -> Any:
    data = dataset_for(args, dataset_name)
    return eval_loader(
        data.test,
        encoder.val_preprocess,
        setting(args, "batch_size") or EVAL_BATCH,
        num_workers_of(args),
        ddp.rank(),
        ddp.world_size(),
    )


def _accuracies(
    features: Callable[[Tensor], Iterator[Tensor]],
    encoder: Encoder,
    dataset_name: str,
    args: Any,
    num_points: int,
) -> list[dict[str, float]]:
    """Top-1 of each of the feature sets that `features` gives for a batch of images."""
    device = device_of(args)
    head = get_classification_head(args, dataset_name).to(device)
    counts = torch.zeros(num_points + 1, dtype=torch.int64, device=device)
    loader = _loader(encoder, dataset_name, args)
    for batch in progress(loader, f"evaluating {dataset_name}", len(loader)):
        images, labels = to_device(batch, device)
        hits = [(head(f).argmax(dim=1) == labels).sum() for f in features(images)]
        counts[:-1] += torch.stack(hits)
        counts[-1] += len(labels)
    *correct, total = ddp.all_sum(counts).tolist()
    return [{"top1": hit / total, "num_images": total} for hit in correct]


@torch.no_grad()
def eval_single_dataset(image_encoder: Encoder, dataset_name: str, args: Any) -> dict[str, float]:
    """Top-1 accuracy of an encoder, with the zero-shot head, on one data set.

    Args:
        image_encoder: standard or linearised.
        dataset_name: X for the test split, XVal for the validation split.
        args: settings.

    Returns:
        {"top1": accuracy in [0, 1], "num_images": images}.
    """
    image_encoder.eval().to(device_of(args))

    def features(images: Tensor) -> Iterator[Tensor]:
        yield image_encoder(images)

    return _accuracies(features, image_encoder, dataset_name, args, 1)[0]


@torch.no_grad()
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
    device = device_of(args)
    encoder.eval().to(device)
    tau = {name: value.to(device) for name, value in tau.items()}
    theta = {name: value.clone() for name, value in encoder.weights().items()}
    moved = isinstance(encoder, LinearizedImageEncoder) and any(
        not torch.equal(theta[name], value) for name, value in encoder.weights0().items()
    )

    params = encoder.model.theta0() if isinstance(encoder, LinearizedImageEncoder) else {}
    direction = {name: tau[name] for name in params}  # buffers take no part in the expansion

    def linear(images: Tensor) -> Iterator[Tensor]:
        assert isinstance(encoder, LinearizedImageEncoder)
        start, step = encoder.model.primal_and_tangent(images, tangent=direction)
        if moved:  # theta is not theta0
            start = encoder(images)
        for coef in coefs:
            yield start + coef * step

    def nonlinear(images: Tensor) -> Iterator[Tensor]:
        for coef in coefs:
            encoder.load_weights(statedict.move(theta, tau, coef))
            yield encoder(images)

    features = linear if isinstance(encoder, LinearizedImageEncoder) else nonlinear
    try:
        results = _accuracies(features, encoder, dataset_name, args, len(coefs))
    finally:
        encoder.load_weights(theta)
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
    control = setting(args, "control_dataset")
    return [*eval_datasets(args), *([control] if control else [])]


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
    if isinstance(pretrained_checkpoint, nn.Module):
        raise TypeError(f"expected an image encoder, got {type(pretrained_checkpoint).__name__}")
    return (LinearizedImageEncoder if linear else ImageEncoder).load(pretrained_checkpoint)


def _is_linear(task_vector: TaskVector, posthoc_linearization: bool) -> bool:
    from src.task_vectors import LinearizedTaskVector

    return posthoc_linearization or isinstance(task_vector, LinearizedTaskVector)


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
    base = load_base(pretrained_checkpoint, _is_linear(task_vector, posthoc_linearization))
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


def add_normalized_accuracy(results: Mapping[str, float], args: Any) -> dict[str, float]:
    """The results with top-1 also divided by `args.finetuning_accuracies`, and both averaged.

    A data set without a fine-tuned accuracy (the control set) is left out of the averages.
    """
    references = setting(args, "finetuning_accuracies") or {}
    added = dict(results)
    tasks = [name for name in references if f"{name}:top1" in results]
    for name in tasks:
        added[f"{name}:normalized_top1"] = results[f"{name}:top1"] / references[name]
    for kind in ("top1", "normalized_top1"):
        if tasks:
            added[f"avg_{kind}"] = float(np.mean([added[f"{name}:{kind}"] for name in tasks]))
    return added


def find_optimal_coef(
    results: Mapping[str, Mapping[str, float]] | Mapping[float, Mapping[str, float]],
    metric: str = "avg_normalized_top1",
    minimize: bool = False,
    control_metric: str | None = None,
    control_metric_threshold: float = 0.0,
) -> float:
    """The coefficient with the best metric among those that keep the control metric.

    Ties go to the smallest coefficient. If none qualifies the answer is 0, the pre-trained model,
    and a warning says so.

    Args:
        results: coefficient -> metrics; keys may be numbers or their texts.
        metric: what to optimise.
        minimize: whether lower is better.
        control_metric: metric that must reach the threshold; None for no condition.
        control_metric_threshold: least value of the control metric.
    """
    sign = 1.0 if minimize else -1.0
    qualified = [
        (sign * found[metric], float(coef))
        for coef, found in results.items()
        if control_metric is None or found[control_metric] >= control_metric_threshold
    ]
    if not qualified:
        logger.warning(
            "no coefficient keeps %s at %.4f or more; taking 0, the pre-trained model",
            control_metric,
            control_metric_threshold,
        )
        return 0.0
    return min(qualified)[1]


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
