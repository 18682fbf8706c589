"""Checks before a run on a small or odd set: one class, and a batch of a single image."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from tangent_arithmetic.data.loading import BatchPlan
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)


def check_one_class(num_classes: int, multilabel: bool, what: str) -> None:
    """Warns if there is nothing to learn: a single class that every image has."""
    if num_classes == 1 and not multilabel and ddp.is_main_process():
        logger.warning(
            "%s: there is one class, so that accuracy is 1, the loss 0, and nothing to learn; only "
            "weight decay will change the weights",
            what,
        )


def check_single_images(model: nn.Module, plan: BatchPlan, image: Tensor, world_size: int) -> None:
    """Refuses batches of one image if the model cannot be trained on them.

    Batch normalisation cannot where a channel has one value, such as after global pooling.

    Args:
        model: in training mode; it is left as it was.
        plan: the images of each step.
        image: an example, shape (1, ...), on the model's device.
        world_size: number of processes that share a batch.

    Raises:
        UsageError: with a batch size that has no such batch, if there is one.
    """
    if _fewest(plan, world_size) > 1 or _takes_one(model, image):
        return
    where = "on a process" if world_size > 1 else "at the end of an epoch"
    sizes = sorted(range(2, plan.num_samples + 1), key=lambda size: abs(size - plan.batch_size))
    fitting = (size for size in sizes if size % world_size == 0)
    for size in fitting:
        if _fewest(_with(plan, size), world_size) > 1:
            way_out = f"use --batch-size={size}"
            break
    else:
        way_out = f"it needs more than {plan.num_samples} training images"
    raise UsageError(
        f"a batch of {plan.batch_size} of {plan.num_samples} images leaves a single one {where}, "
        f"which the model's batch normalisation cannot be trained on; {way_out}"
    )


def _with(plan: BatchPlan, batch_size: int) -> BatchPlan:
    return replace(plan, batch_size=batch_size)


def _fewest(plan: BatchPlan, world_size: int) -> int:
    """The fewest images that a process gets in a micro-step; a stand-in counts as one."""
    last = plan.micro_sizes(plan.steps_per_epoch - 1)[-1]
    return max(1, min(last, plan.batch_size) // world_size)


@torch.no_grad()
def _takes_one(model: nn.Module, image: Tensor) -> bool:
    """Whether the model, in training mode, accepts one image; its buffers are restored."""
    kinds = nn.modules.batchnorm._BatchNorm
    if not any(isinstance(module, kinds) and module.training for module in model.modules()):
        return True
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model(image)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return True
