"""The training loop, the same for all modes, objectives and optimizers, with exact resume.

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tangent_arithmetic.data.base import Pictures, name_of
from tangent_arithmetic.data.loading import (
    BatchPlan,
    RankBatches,
    SeededPictures,
    to_device,
    train_loader,
)
from tangent_arithmetic.data.texts import collate
from tangent_arithmetic.data.waiting import iterating
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute, Precision
from tangent_arithmetic.runtime.errors import DivergedError, UsageError
from tangent_arithmetic.runtime.logs import Progress, Tracker
from tangent_arithmetic.runtime.processes import Stopped, deferred_signals
from tangent_arithmetic.storage.statedict import copy_into
from tangent_arithmetic.tangent.functional import evaluating
from tangent_arithmetic.training.averaging import TailMean
from tangent_arithmetic.training.objectives import CrossEntropy, Objective, supervised_of
from tangent_arithmetic.training.optimizers import OPTIMIZERS, OptimizerFactory
from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.resume import Keeper, Snapshots, not_finite_in
from tangent_arithmetic.training.schedule import SCHEDULES, cosine_lr
from tangent_arithmetic.training.small_sets import check_one_class, check_single_images
from tangent_arithmetic.training.stopping import Stopping

logger = logging.getLogger(__name__)

CLIP_NORM = 1.0
CAUSES = {"loss": "loss", "penalty": "penalty", "grad_norm": "gradient's norm"}  # of divergence


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party transforms draw from it
    torch.manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Seeds the model's random draws of a step (dropout) from (seed, step, rank).

    An interrupted run thus has no generators to restore.
    """
    entropy = np.random.SeedSequence((seed, 13, step, ddp.rank()))
    seed_everything(int(entropy.generate_state(1, np.uint32)[0]))


@dataclass(frozen=True)
class TrainingData:
    """The data that a model is trained on.

    Attributes:
        pictures: the training pictures.
        transform: maps a picture to a tensor, with random augmentation.
        num_workers: data-loading processes.
    """

    pictures: Pictures
    transform: Callable[[Any], Any] | None = None
    num_workers: int = 0


def wrap_ddp(model: nn.Module, device: torch.device, some_unused: bool = False) -> nn.Module:
    """The model, wrapped in DDP if there are several processes.

    Args:
        model: the model.
        device: its device.
        some_unused: whether a forward pass may leave out parameters.
    """
    if ddp.world_size() == 1:
        return model
    ids = [device.index or 0] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {name: False, "find_unused_parameters": some_unused}
    return DistributedDataParallel(model, device_ids=ids, **options)  # type: ignore[arg-type]


def unused_parameters(model: nn.Module, batch: Tensor) -> tuple[dict[str, nn.Parameter], int]:
    """The trained parameters that the logits of some images do not depend on.

    One backward pass in eval mode finds them; nothing in the model changes. Other images may use
    them, such as the experts of a mixture.

    Args:
        model: maps images to logits.
        batch: the images.

    Returns:
        The parameters by name, and the number of logits.

    Raises:
        UsageError: if the logits depend on no trained parameter.
    """
    with evaluating(model):
        logits = model(batch)
    if not logits.requires_grad:
        raise UsageError(
            "the logits depend on none of the parameters that are to be trained: --trainable "
            "selects others than the model uses, the model came with frozen parameters "
            "(requires_grad is False), or its forward pass is without gradients (torch.no_grad, "
            "detach)"
        )
    logits.float().sum().backward()
    unused = {n: p for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    model.zero_grad(set_to_none=True)
    return unused, logits.shape[-1]


def step_gradients(
    model: nn.Module,
    plan: BatchPlan,
    step: int,
    batches: Iterator[Any],
    device: torch.device,
    objective: Objective | None = None,
    precision: Precision = "fp32",
) -> float:
    r"""Adds the gradient of the step's mean loss, \(\frac1N \sum_i \ell_i\), to the parameters.

    Args:
        model: the model; wrapped in DDP if there are several ranks.
        plan: the images of each step.
        step: the optimizer step, from the start of the run.
        batches: yields this rank's share of each micro-step.
        device: the model's device.
        objective: the loss; cross-entropy if None.
        precision: "fp32", or "bf16" for autocast.

    Returns:
        The mean loss over the N images of all ranks.
    """
    objective = objective or CrossEntropy()
    sizes = plan.micro_sizes(step)
    total = sum(sizes)
    world_size, rank = ddp.world_size(), ddp.rank()
    loss_sum = torch.zeros((), device=device)
    for i, size in enumerate(sizes):
        batch = to_device(next(batches), device)
        wait = isinstance(model, DistributedDataParallel) and i + 1 < len(sizes)
        with model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with Compute(device, precision).autocast():
                loss = _summed(objective.loss(model, batch, step), len(batch[0]))
            if rank >= size:  # a stand-in, see RankBatches
                loss = loss * 0.0
            # DDP averages gradients over ranks, hence the factor
            (loss * (world_size / total)).backward()
        loss_sum += loss.detach()
    return float(ddp.all_sum(loss_sum)) / total


def penalty_gradient(
    model: nn.Module, step: int, objective: Objective, compute: Compute
) -> float | None:
    """Adds the gradient of the objective's penalty to the parameters; its mean over the ranks.

    With several ranks done before the first forward pass of a step, so that DDP averages it along
    with that of the loss; with one afterwards, so that the pass needs no room for gradients.

    Args:
        model: the model, not wrapped.
        step: the optimizer step.
        objective: the objective.
        compute: device and precision.
    """
    with compute.autocast():
        penalty = objective.penalty(model, step)
    if penalty is None:
        return None
    penalty.backward()
    return float(ddp.all_sum(penalty.detach())) / ddp.world_size()


def _summed(loss: Tensor, count: int) -> Tensor:
    """The sum of the losses of `count` images, from an objective's losses or their mean."""
    if loss.ndim == 0:
        return loss * count
    if loss.shape != (count,):
        raise ValueError(
            f"expected an objective that returns {count} losses, one per image, or their mean; got "
            f"shape {tuple(loss.shape)}"
        )
    return loss.sum()


def train(
    model: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    *,
    objective: Objective | None = None,
    optimizer: OptimizerFactory | None = None,
    seed: int = 0,
    snapshots: Snapshots | None = None,
    tracker: Tracker | None = None,
    description: str = "fine-tuning",
    stopping: Stopping | None = None,
) -> dict[str, Any]:
    """Trains the parameters that require grad, in place and on the model's device.

    Learning rates follow the recipe's schedule; gradients are clipped to norm 1. The weights at the
    end are the last iterate, or the mean of the last ones that the recipe averages.

    Args:
        model: maps images to logits, shape (batch, classes).
        data: the training pictures.
        recipe: optimizer, learning rate, epochs, batch size and so on.
        objective: the loss; if None cross-entropy with the recipe's label smoothing, binary for
            several labels an image.
        optimizer: builds the optimizer; the recipe's if None.
        seed: determines the order of the pictures and their augmentation.
        snapshots: files to write during the run, and to continue from.
        tracker: logs loss, learning rate and gradient norm.
        description: label of the progress bar.
        stopping: measures during the run, and may end it before its last step. Called on all ranks,
            with the mean of the iterates in place once there is one; it may leave the model in
            evaluation mode, and must not change weights or random generators.

    Returns:
        Metadata for the checkpoint: steps, of how many that were planned, seconds, the last epoch's
        mean loss, the recipe.

    Raises:
        UsageError: if the ranks cannot share a batch, or a picture cannot be read.
        DivergedError: if a loss or gradient is not finite, before the step is taken.
        Stopped: on SIGTERM or SIGINT, after the step is finished and a state written.
    """
    snapshots, tracker = snapshots or Snapshots(), tracker or Tracker()
    check_batch(recipe.batch_size, ddp.world_size())
    sizes = recipe.batch_size, recipe.num_grad_accumulation
    plan = BatchPlan.of(data.pictures, data.transform, *sizes, seed)
    steps, device = recipe.steps(plan.steps_per_epoch), next(model.parameters()).device
    compute = Compute(device, recipe.precision)
    unused, num_classes, multilabel = _prepare(model, data, compute, plan)
    check_one_class(num_classes, multilabel, description)
    objective = objective or supervised_of(recipe, multilabel)
    wrapped = wrap_ddp(model, device, some_unused=bool(unused))
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optim = (optimizer or OPTIMIZERS[recipe.optimizer])(params, recipe)
    rates = [group["lr"] for group in optim.param_groups]
    set_rate = cosine_lr(optim, rates, recipe.warmup_length, steps, SCHEDULES[recipe.schedule])
    average = TailMean({**params, **_statistics(model)}, recipe.averaging, steps)
    stateful: dict[str, Any] = {"objective": objective, "average": average}
    stateful |= {"stopping": stopping} if stopping else {}
    keeper = Keeper(snapshots.states, model, optim, stateful)
    keeper.resume()
    shares = RankBatches(plan, keeper.done, steps, ddp.rank(), ddp.world_size())
    loader = train_loader(data.pictures, data.transform, shares, data.num_workers, num_classes)
    stepper = _Stepper(
        model=model,
        wrapped=wrapped,
        optimizer=optim,
        objective=objective,
        plan=plan,
        recipe=recipe,
        compute=compute,
        seed=seed,
        pictures=data.pictures,
        unused=unused,
        keeper=keeper,
    )
    with deferred_signals() as asked, closing(objective), iterating(loader) as batches:
        bar = Progress(range(keeper.done, steps), description, done=keeper.done, unit="step")
        for step in bar:
            set_rate(step)
            values = stepper.take(step, batches)
            average.update(keeper.done)
            bar.note(sum(plan.micro_sizes(step)), loss=values["loss"])
            tracker.log(values, step)
            snapshot = snapshots.every > 0 and keeper.done % snapshots.every == 0
            if snapshot or keeper.done == steps:
                _check_finite(model, keeper.done, recipe)
            if snapshot:
                snapshots.save(keeper.done)
            settled = average.begun or not recipe.averaging
            if stopping is not None and stopping.due(keeper.done, steps, settled):
                with average.placed():
                    enough = stopping(keeper.done)
                model.train()
                if enough:
                    break
            due = keeper.done < steps and keeper.due()
            stop, due = ddp.any_of(asked() > 0, due, device=device)
            if stop or due:
                keeper.save()
            if stop:
                place = f"{description}: stopped after step {keeper.done} of {steps}"
                logger.warning("%s on a signal; the same command continues the run", place)
                raise Stopped(asked() or signal.SIGTERM)
        batches.note(description, data.num_workers)
    average.place()
    model.eval()
    return {**_facts(keeper, plan, recipe, seed), "planned": steps}


@dataclass(frozen=True)
class _Stepper:
    """Takes the optimizer steps of a run, at the learning rates that are set.

    Attributes:
        model: the model.
        wrapped: the same, wrapped in DDP if there are several ranks.
        optimizer: of its trained parameters.
        objective: the loss and its penalty.
        plan: the pictures of each step.
        recipe: of the run, for messages.
        compute: device and precision.
        seed: of the run.
        pictures: the training pictures, for messages.
        unused: parameters that need not take part in a step.
        keeper: notes the losses, and saves the state before a step that is not finite.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    objective: Objective
    plan: BatchPlan
    recipe: Recipe
    compute: Compute
    seed: int
    pictures: Pictures
    unused: list[nn.Parameter]
    keeper: Keeper

    def take(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        """Takes a step; its loss, learning rate, gradient norm and, if there is one, penalty.

        Raises:
            DivergedError: if one of these is not finite; the step is not taken, and buffers and
                objective are as before it.
        """
        seed_step(self.seed, step)
        before = _copies(dict(self.model.named_buffers())), _copies(self.objective.state_dict())
        values = self._gradients(step, batches)
        wrong = [name for name in CAUSES if not math.isfinite(values.get(name, 0.0))]
        if wrong:
            copy_into(dict(self.model.named_buffers()), before[0], "buffers")
            self.objective.load_state_dict(before[1])
            self.keeper.save()
            raise self._diverged(f"the {CAUSES[wrong[0]]} is {values[wrong[0]]}", step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.keeper.losses.append(values["loss"])
        return values

    def _gradients(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        """Sets the clipped gradients; what `take` returns."""
        compute, several = self.compute, ddp.world_size() > 1
        penalised = partial(penalty_gradient, self.model, step, self.objective, compute)
        penalty = penalised() if several else None
        where = compute.device, self.objective, compute.precision
        loss = step_gradients(self.wrapped, self.plan, step, batches, *where)
        penalty = penalty if several else penalised()
        _drop_zeros(self.unused)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM))
        values = {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm}
        return values if penalty is None else {**values, "penalty": penalty}

    def _diverged(self, cause: str, step: int) -> DivergedError:
        indices = [index for batch in self.plan.micro_batches(step) for _, index in batch]
        names = ", ".join(name_of(self.pictures, index) for index in indices[:3])
        kept, states = "", self.keeper.states
        if states is not None and any(states.folder.glob("*.safetensors")):
            kept = f". The weights before this step are in {states.folder}"
        return DivergedError(
            f"{cause} at step {step} (epoch {step // self.plan.steps_per_epoch}, batch of "
            f"{len(indices)} images: {names}{', ...' if len(indices) > 3 else ''}), expected a "
            f"finite number{kept}. Try a lower --lr than {self.recipe.lr}, or look at these images"
        )


def _prepare(
    model: nn.Module, data: TrainingData, compute: Compute, plan: BatchPlan
) -> tuple[list[nn.Parameter], int, bool]:
    """Sets training mode, and checks that each batch can be trained on.

    Returns:
        The trained parameters that the first two images do not use, the number of classes, and
        whether an image has several labels.
    """
    if not len(data.pictures):
        raise UsageError("expected pictures to train on, got an empty data set")
    if wrong := not_finite_in(model):
        raise UsageError(
            f"expected finite weights to start from, got NaN or infinity in {', '.join(wrong)}; "
            "register a buffer that holds it on purpose with persistent=False, or under a name "
            "that ends in mask"
        )
    examples = SeededPictures(data.pictures, data.transform)
    items = [examples[i % len(examples)] for i in range(2)]  # batch norm needs two
    two, labels = to_device(collate(items), compute.device)
    with compute.autocast():
        unused, num_classes = unused_parameters(model.train(), two)
        check_single_images(model, plan, two[:1], ddp.world_size())
    if unused:
        names = ", ".join(unused)
        logger.info("not used by the first two images, trained in steps that use them: %s", names)
    return list(unused.values()), num_classes, labels.ndim == 2


def _drop_zeros(parameters: Iterable[nn.Parameter]) -> None:
    """Drops gradients of zero, which only a penalty gives parameters that no image uses.

    The optimizer then leaves these alone; otherwise weight decay would move them.
    """
    for parameter in parameters:
        if parameter.grad is not None and not parameter.grad.any():
            parameter.grad = None


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of floating-point numbers, such as batch norm's statistics."""
    kept = model.state_dict()
    return {n: b for n, b in model.named_buffers() if n in kept and b.is_floating_point()}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _check_finite(model: nn.Module, done: int, recipe: Recipe) -> None:
    """Raises a `DivergedError` if the weights of any rank are not finite."""
    if any(ddp.any_of(bool(not_finite_in(model)), device=next(model.parameters()).device)):
        raise DivergedError(
            f"weights are not finite after step {done}, expected finite numbers; they are not "
            f"saved. Try a lower --lr than {recipe.lr}"
        )


def _facts(keeper: Keeper, plan: BatchPlan, recipe: Recipe, seed: int) -> dict[str, Any]:
    recent = keeper.losses[-plan.steps_per_epoch :]
    return {
        "steps": keeper.done,
        "seconds": round(keeper.seconds(), 1),
        "last_epoch_loss": sum(recent) / len(recent),
        "recipe": asdict(recipe),
        "seed": seed,
        "world_size": ddp.world_size(),
    }


def check_batch(batch_size: int, world_size: int) -> None:
    """Raises a `UsageError` if processes cannot share a batch evenly; it lists what fits."""
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
