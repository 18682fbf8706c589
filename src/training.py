"""Fine-tuning: the loop that standard and linear mode share, with exact resume.

The gradient of an optimizer step is that of the mean loss over all its images, whatever the number
of ranks, micro-steps or images left at the end of an epoch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from src import ddp
from src.checkpoints import load_resume, save_resume
from src.data.base import Pictures
from src.data.loading import BatchPlan, RankBatches, SeededPictures, to_device, train_loader
from src.logs import Run, progress
from src.settings import Recipe, autocast

logger = logging.getLogger(__name__)

CLIP_NORM = 1.0
RESUME_SECONDS = 300.0  # a run under way is saved about this often


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party transforms draw from it
    torch.manual_seed(seed)


def cosine_factor(step: int, warmup_length: int, steps: int) -> float:
    """The learning rate at an optimizer step, as a share of its peak.

    Linear warm-up over `warmup_length` steps (at most the run's length), then a half cosine to 0.

    Args:
        step: from 0.
        warmup_length: steps of warm-up.
        steps: steps of the run.
    """
    warmup = min(warmup_length, steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def cosine_lr(
    optimizer: Optimizer, base_lrs: float | list[float], warmup_length: int, steps: int
) -> Callable[[int], None]:
    """A function of the step that sets the learning rate of each parameter group.

    Args:
        optimizer: the optimizer.
        base_lrs: peak learning rate, one or one a group.
        warmup_length: steps of warm-up.
        steps: steps of the run.
    """
    groups = optimizer.param_groups
    peaks = base_lrs if isinstance(base_lrs, list) else [base_lrs] * len(groups)
    if len(peaks) != len(groups):
        raise ValueError(f"expected {len(groups)} learning rates, one a group, got {len(peaks)}")

    def set_rate(step: int) -> None:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * cosine_factor(step, warmup_length, steps)

    return set_rate


@dataclass(frozen=True)
class Snapshots:
    """What the loop does with the model on the way.

    Attributes:
        resume_path: where the state of the run is kept until it ends.
        every: optimizer steps between snapshots; -1 for none.
        save: called with the number of steps done.
    """

    resume_path: Path | None = None
    every: int = -1
    save: Callable[[int], None] | None = None


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model under DDP if there are several processes."""
    if ddp.world_size() == 1:
        return model
    ids = [device.index or 0] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def freeze_unused(model: nn.Module, batch: Tensor) -> list[str]:
    """Stops training the parameters that the model's output does not depend on.

    Found by one backward pass in eval mode; what the model holds is not changed otherwise.

    Args:
        model: gives logits.
        batch: images to try it on.

    Returns:
        Their names.
    """
    training = model.training
    model.eval()(batch).float().sum().backward()
    model.train(training)
    unused = {n: p for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return list(unused)


def step_gradients(
    model: nn.Module,
    plan: BatchPlan,
    step: int,
    batches: Iterator[Any],
    device: torch.device,
    smoothing: float = 0.0,
    precision: str = "fp32",
) -> float:
    r"""Adds the gradient of the step's mean loss, \(\frac1N \sum_i \ell_i\), to the parameters.

    Args:
        model: gives logits; under DDP if there are several processes.
        plan: which images the step holds.
        step: the optimizer step, from the run's start.
        batches: gives this rank's share of each micro-step.
        device: where the model is.
        smoothing: label smoothing.
        precision: "fp32", or "bf16" for autocast.

    Returns:
        The mean loss over the N images of all ranks.
    """
    sizes = plan.micro_sizes(step)
    total = sum(sizes)
    world_size, rank = ddp.world_size(), ddp.rank()
    loss_sum = torch.zeros((), device=device)
    for i, size in enumerate(sizes):
        images, labels = to_device(next(batches), device)
        wait = isinstance(model, DistributedDataParallel) and i + 1 < len(sizes)
        with model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(precision, device):
                losses = F.cross_entropy(
                    model(images), labels, reduction="sum", label_smoothing=smoothing
                )
            if rank >= size:  # a stand-in, see RankBatches
                losses = losses * 0.0
            # DDP averages gradients over ranks, hence the factor
            (losses * (world_size / total)).backward()
        loss_sum += losses.detach()
    return float(ddp.all_sum(loss_sum)) / total


def train(
    classifier: nn.Module,
    pictures: Pictures,
    transform: Callable[[Any], Any],
    recipe: Recipe,
    seed: int,
    device: torch.device,
    description: str = "fine-tuning",
    num_workers: int = 0,
    snapshots: Snapshots | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Fine-tunes the trainable parameters of a classifier, in place.

    AdamW, linear warm-up and cosine decay in optimizer steps, gradients clipped to norm 1.

    Args:
        classifier: gives logits (batch, classes) of images.
        pictures: the training pictures.
        transform: of a picture, for training.
        recipe: learning rate, epochs, batch size and so on.
        seed: of the order of the pictures and of their augmentation.
        device: where to train.
        description: for the progress bar.
        num_workers: data-loading processes.
        snapshots: where to keep the state on the way; a state found there is continued, exactly.
        run: W&B.

    Returns:
        Facts for the checkpoint: steps, seconds, the last epoch's mean loss, the recipe.
    """
    snapshots, run = snapshots or Snapshots(), run or Run()
    plan = BatchPlan(len(pictures), recipe.batch_size, recipe.num_grad_accumulation, seed)
    steps = recipe.epochs * plan.steps_per_epoch
    classifier.to(device).train()
    with autocast(recipe.precision, device):
        unused = freeze_unused(classifier, _some(pictures, transform).to(device))
    if unused:
        logger.info("not used by the model, hence frozen: %s", ", ".join(unused))
    model = wrap_ddp(classifier, device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr=recipe.lr, weight_decay=recipe.wd)
    set_rate = cosine_lr(optimizer, recipe.lr, recipe.warmup_length, steps)
    fingerprint = {**asdict(recipe), "seed": seed, "num_samples": len(pictures)}
    done, seconds, losses = _resume(snapshots.resume_path, fingerprint, params, optimizer)
    batches = iter(
        train_loader(
            pictures,
            transform,
            RankBatches(plan, done, steps, ddp.rank(), ddp.world_size()),
            num_workers,
        )
    )
    start = last_saved = time.monotonic()
    for step in progress(range(done, steps), description):
        set_rate(step)
        losses.append(
            step_gradients(model, plan, step, batches, device, recipe.ls, recipe.precision)
        )
        norm = float(torch.nn.utils.clip_grad_norm_(params, CLIP_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(
            {"loss": losses[-1], "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm},
            step,
        )
        _check_finite(losses[-1], step, recipe)
        ended = step + 1
        if snapshots.save and snapshots.every > 0 and ended % snapshots.every == 0:
            snapshots.save(ended)
            last_saved -= RESUME_SECONDS
        due = ddp.all_agree(time.monotonic() - last_saved >= RESUME_SECONDS)
        if snapshots.resume_path and due and ended < steps:
            spent = seconds + time.monotonic() - start
            _save_resume(
                snapshots.resume_path, fingerprint, params, optimizer, ended, spent, losses
            )
            last_saved = time.monotonic()
    classifier.eval()
    recent = losses[-plan.steps_per_epoch :]
    return {
        "steps": steps,
        "seconds": round(seconds + time.monotonic() - start, 1),
        "last_epoch_loss": sum(recent) / len(recent),
        "recipe": asdict(recipe),
        "seed": seed,
        "world_size": ddp.world_size(),
    }


def _some(pictures: Pictures, transform: Callable[[Any], Any]) -> Tensor:
    """The first pictures as a batch of two (batch norm needs two)."""
    data = SeededPictures(pictures, transform)
    return torch.stack([data[i % len(data)][0] for i in range(2)])


def _check_finite(loss: float, step: int, recipe: Recipe) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step}, expected a number; "
            f"try a lower --lr than {recipe.lr}"
        )


def _save_resume(
    path: Path,
    fingerprint: dict[str, Any],
    params: list[nn.Parameter],
    optimizer: Optimizer,
    done: int,
    seconds: float,
    losses: list[float],
) -> None:
    if ddp.is_main_process():
        state = {
            "fingerprint": fingerprint,
            "params": [p.detach().cpu() for p in params],
            "optimizer": optimizer.state_dict(),
            "done": done,
            "seconds": seconds,
            "losses": losses,
        }
        save_resume(path, state)
    ddp.barrier()


def _resume(
    path: Path | None,
    fingerprint: dict[str, Any],
    params: list[nn.Parameter],
    optimizer: Optimizer,
) -> tuple[int, float, list[float]]:
    """Continues an interrupted run of the same settings: steps done, seconds spent, losses."""
    state = load_resume(path) if path else None
    if state is None:
        return 0, 0.0, []
    if state["fingerprint"] != fingerprint:
        logger.info("%s is of other settings; starting anew", path)
        return 0, 0.0, []
    with torch.no_grad():
        for own, kept in zip(params, state["params"], strict=True):
            own.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    logger.info("continuing after step %d", state["done"])
    return state["done"], state["seconds"], state["losses"]
