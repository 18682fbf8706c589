"""Fine-tuning: the loop that standard and linear mode share, with exact resume.

The gradient of an optimizer step is that of the mean loss over all its images, whatever the number
of ranks, micro-steps or images left at the end of an epoch.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from tangent_arithmetic.data.base import Pictures, name_of
from tangent_arithmetic.data.loading import (
    BatchPlan,
    RankBatches,
    SeededPictures,
    iterating,
    to_device,
    train_loader,
)
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute, Precision
from tangent_arithmetic.runtime.errors import DivergedError, UsageError
from tangent_arithmetic.runtime.logs import Tracker, progress
from tangent_arithmetic.runtime.processes import Stopped, deferred_signals
from tangent_arithmetic.storage.checkpoints import not_finite
from tangent_arithmetic.storage.states import RunStates, differences, pack, unpack
from tangent_arithmetic.training.recipe import Recipe

logger = logging.getLogger(__name__)

CLIP_NORM = 1.0


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party transforms draw from it
    torch.manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Seeds what the model draws in a step, dropout for instance, from (seed, step, rank) alone.

    So a run that was interrupted has no generator to restore.
    """
    entropy = np.random.SeedSequence((seed, 13, step, ddp.rank()))
    seed_everything(int(entropy.generate_state(1, np.uint32)[0]))


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
    count = len(optimizer.param_groups)
    peaks = base_lrs if isinstance(base_lrs, list) else [base_lrs] * count
    if len(peaks) != count:
        raise ValueError(f"expected {count} learning rates, one a group, got {len(peaks)}")

    def set_rate(step: int) -> None:  # loading a state gives the optimizer other groups
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine_factor(step, warmup_length, steps)

    return set_rate


@dataclass(frozen=True)
class Snapshots:
    """What is kept of a run on the way.

    Attributes:
        states: where its states are kept until it ends; a state found there is continued, exactly.
        every: optimizer steps between snapshots of the model; -1 for none.
        save: writes a snapshot; called with the number of steps done.
    """

    states: RunStates | None = None
    every: int = -1
    save: Callable[[int], None] | None = None

    def keep(self, done: int) -> None:
        """Writes a snapshot."""
        if self.save is not None:
            self.save(done)

    def due(self, done: int) -> bool:
        """Whether there is to be a snapshot after `done` steps."""
        return self.save is not None and self.every > 0 and done % self.every == 0


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model under DDP if there are several processes."""
    if ddp.world_size() == 1:
        return model
    ids = [device.index or 0] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"device_ids": ids, name: False}
    return DistributedDataParallel(model, **options)


def freeze_unused(model: nn.Module, batch: Tensor) -> tuple[list[str], int]:
    """Stops training the parameters that the model's output does not depend on.

    Found by one backward pass in eval mode; what the model holds is not changed otherwise.

    Args:
        model: gives logits.
        batch: images to try it on.

    Returns:
        Their names, and the number of logits.
    """
    training = model.training
    logits = model.eval()(batch)
    logits.float().sum().backward()
    model.train(training)
    unused = {n: p for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return list(unused), logits.shape[-1]


def step_gradients(
    model: nn.Module,
    plan: BatchPlan,
    step: int,
    batches: Iterator[Any],
    device: torch.device,
    smoothing: float = 0.0,
    precision: Precision = "fp32",
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
            with Compute(device, precision).autocast():
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
    transform: Callable[[Any], Any] | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    description: str = "fine-tuning",
    num_workers: int = 0,
    snapshots: Snapshots | None = None,
    tracker: Tracker | None = None,
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
        snapshots: what to keep on the way, and to continue.
        tracker: where loss, learning rate and norm of the gradient are logged.

    Returns:
        Facts for the checkpoint: steps, seconds, the last epoch's mean loss, the recipe.

    Raises:
        UsageError: if the processes cannot share a batch, or a picture cannot be read.
        DivergedError: at a loss or a gradient that is not finite, before a step is made of it.
        Stopped: if SIGTERM or SIGINT asks to; the step is finished and the state kept.
    """
    snapshots, tracker = snapshots or Snapshots(), tracker or Tracker()
    check_batch(recipe.batch_size, ddp.world_size())
    plan = BatchPlan(len(pictures), recipe.batch_size, recipe.num_grad_accumulation, seed)
    steps = recipe.epochs * plan.steps_per_epoch
    classifier.to(device).train()
    with Compute(device, recipe.precision).autocast():
        unused, classes = freeze_unused(classifier, _some(pictures, transform).to(device))
    if unused:
        logger.info("not used by the model, hence frozen: %s", ", ".join(unused))
    model = wrap_ddp(classifier, device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr=recipe.lr, weight_decay=recipe.wd)
    set_rate = cosine_lr(optimizer, recipe.lr, recipe.warmup_length, steps)
    keeper = _Keeper(snapshots.states, classifier, optimizer)
    keeper.resume()
    done, losses = keeper.done, keeper.losses
    shares = RankBatches(plan, done, steps, ddp.rank(), ddp.world_size())
    loader = train_loader(pictures, transform, shares, num_workers, classes)
    with deferred_signals() as asked, iterating(loader) as batches:
        for step in progress(range(done, steps), description):
            seed_step(seed, step)
            set_rate(step)
            loss = step_gradients(model, plan, step, batches, device, recipe.ls, recipe.precision)
            norm = float(torch.nn.utils.clip_grad_norm_(params, CLIP_NORM))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                keeper.save()
                raise _diverged(loss, norm, plan, step, pictures, recipe, snapshots.states)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            keeper.done = ended = step + 1
            rate = optimizer.param_groups[0]["lr"]
            tracker.log({"loss": loss, "lr": rate, "grad_norm": norm}, step)
            if snapshots.due(ended) or ended == steps:
                _require_finite(classifier, ended, recipe, device)
            if snapshots.due(ended):
                snapshots.keep(ended)
            due = ended < steps and keeper.due()
            stop, due = ddp.any_of(asked() > 0, due, device=device)
            if stop or due:
                keeper.save()
            if stop:
                logger.warning(
                    "%s: stopped after step %d of %d, as a signal asked; the same command "
                    "continues it", description, ended, steps,
                )  # fmt: skip
                raise Stopped(asked() or signal.SIGTERM)
    classifier.eval()
    recent = losses[-plan.steps_per_epoch :]
    return {
        "steps": steps,
        "seconds": round(keeper.seconds(), 1),
        "last_epoch_loss": sum(recent) / len(recent),
        "recipe": asdict(recipe),
        "seed": seed,
        "world_size": ddp.world_size(),
    }


class _Keeper:
    """Writes and reads the states of a run: the first process writes, all read.

    Args:
        states: where; None keeps nothing.
        classifier: what is trained.
        optimizer: what trains it.
    """

    def __init__(
        self, states: RunStates | None, classifier: nn.Module, optimizer: Optimizer
    ) -> None:
        self.states, self.classifier, self.optimizer = states, classifier, optimizer
        self.done, self.losses = 0, list[float]()
        self._before, self._start = 0.0, time.monotonic()
        device = next(classifier.parameters()).device.type
        self.where = {"processes": ddp.world_size(), "device": device}

    def seconds(self) -> float:
        """Time spent in training, before it was interrupted too."""
        return self._before + time.monotonic() - self._start

    def due(self) -> bool:
        """Whether it is time for a state."""
        return self.states is not None and ddp.is_main_process() and self.states.due(self.done)

    def save(self) -> None:
        """Keeps the state of now, unless its weights are not finite."""
        if self.states is not None and ddp.is_main_process() and _is_finite(self.classifier):
            tensors = pack(self.classifier, self.optimizer)
            tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
            self.states.save(tensors, self.done, {"seconds": self.seconds(), **self.where})
        ddp.barrier()

    def resume(self) -> None:
        """Continues the newest state, if there is one.

        Raises:
            UsageError: if not all processes see the same states.
        """
        if self.states is None:
            return
        trained = sum(p.numel() for p in self.classifier.parameters() if p.requires_grad)
        self.states.expect(12 * trained)  # weights and two moments, in float32
        found = self.states.newest()
        self.done = 0 if found is None else found.done
        first = ddp.all_agree(self.done)
        if self.done != first:
            raise UsageError(
                f"rank {ddp.rank()} finds the run at step {self.done} in {self.states.folder}, the "
                f"first process at step {first}; --save must be a folder that all machines share"
            )
        if found is None:
            return
        tensors = dict(found.tensors)
        self.losses = tensors.pop("losses").tolist()
        unpack(tensors, self.classifier, self.optimizer)
        self._before = found.facts["seconds"]
        logger.info("continuing after step %d (%s)", self.done, self.states.folder)
        if differ := differences({k: found.facts.get(k) for k in self.where}, self.where):
            logger.warning(
                "%s: the weights will equal those of an uninterrupted run up to rounding, not bit "
                "for bit", "; ".join(differ),
            )  # fmt: skip


def _some(pictures: Pictures, transform: Callable[[Any], Any] | None) -> Tensor:
    """The first pictures as a batch of two (batch norm needs two)."""
    data = SeededPictures(pictures, transform)
    return torch.stack([data[i % len(data)][0] for i in range(2)])


def check_batch(batch_size: int, world_size: int) -> None:
    """Refuses a batch that the processes cannot share evenly.

    Raises:
        UsageError: with the sizes, and the numbers of processes, that can.
    """
    if batch_size % world_size == 0:
        return
    below = batch_size // world_size * world_size
    sizes = " or ".join(f"--batch-size={n}" for n in (below, below + world_size) if n)
    counts = [str(n) for n in range(1, batch_size + 1) if batch_size % n == 0]
    raise UsageError(
        f"a batch of {batch_size} images cannot be shared by {world_size} processes; expected "
        f"{sizes} (images over all processes), or a number of processes that divides "
        f"{batch_size}: {', '.join(counts)}"
    )


def _is_finite(model: nn.Module) -> bool:
    """Whether what training changes, trained weights and buffers, is finite."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return not not_finite({**trained, **dict(model.named_buffers())})


def _require_finite(model: nn.Module, done: int, recipe: Recipe, device: torch.device) -> None:
    """Ends the run, in all its processes, where a model that is to be kept is not finite."""
    if any(ddp.any_of(not _is_finite(model), device=device)):
        raise DivergedError(
            f"weights are not finite after step {done}, expected finite numbers; no checkpoint is "
            f"made of them. Try a lower --lr than {recipe.lr}"
        )


def _diverged(
    loss: float,
    norm: float,
    plan: BatchPlan,
    step: int,
    pictures: Pictures,
    recipe: Recipe,
    states: RunStates | None,
) -> DivergedError:
    found = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    indices = [index for batch in plan.micro_batches(step) for _, index in batch]
    names = ", ".join(name_of(pictures, index) for index in indices[:3])
    kept = ""
    if states is not None and any(states.folder.glob("*.safetensors")):
        kept = f". The weights before it are kept in {states.folder}"
    return DivergedError(
        f"{found} at step {step} (epoch {step // plan.steps_per_epoch}, batch of {len(indices)} "
        f"images: {names}{', ...' if len(indices) > 3 else ''}), expected a finite number{kept}. "
        f"Try a lower --lr than {recipe.lr}, or look at these images"
    )
