"""The learning rate over a run: linear warm-up, then a half cosine or a constant."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

from tangent_arithmetic.runtime.registry import Registry

Schedule = Callable[[int, int, int], float]
SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("cosine")
def cosine_factor(step: int, warmup_length: int, steps: int) -> float:
    """The learning rate at an optimizer step, as a share of its peak.

    Linear warm-up over `warmup_length` steps (at most `steps`), then a half cosine to 0.

    Args:
        step: the optimizer step, from 0.
        warmup_length: steps of warm-up.
        steps: steps of the run.
    """
    warmup = min(warmup_length, steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


@SCHEDULES.register("constant")
def constant_factor(step: int, warmup_length: int, steps: int) -> float:
    """The learning rate at an optimizer step, as a share of its peak: warm-up, then the peak."""
    return min(1.0, (step + 1) / max(1, min(warmup_length, steps)))


def cosine_lr(
    optimizer: Optimizer,
    base_lrs: float | list[float],
    warmup_length: int,
    steps: int,
    factor: Schedule = cosine_factor,
) -> Callable[[int], None]:
    """A function of the step that sets the learning rate of each parameter group.

    Args:
        optimizer: the optimizer.
        base_lrs: peak learning rate, or one per group.
        warmup_length: steps of warm-up, see `cosine_factor`.
        steps: steps of the run.
        factor: the rate's share of its peak, of the step, `warmup_length` and `steps`.

    Raises:
        ValueError: if there are not as many rates as groups.
    """
    count = len(optimizer.param_groups)
    peaks = base_lrs if isinstance(base_lrs, list) else [base_lrs] * count
    if len(peaks) != count:
        raise ValueError(f"expected {count} learning rates, one per group, got {len(peaks)}")

    def set_rate(step: int) -> None:  # loading a state replaces the optimizer's groups
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step, warmup_length, steps)

    return set_rate
