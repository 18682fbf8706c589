"""The learning rate over a run: linear warm-up, then a half cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer


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


def cosine_lr(
    optimizer: Optimizer, base_lrs: float | list[float], warmup_length: int, steps: int
) -> Callable[[int], None]:
    """A function of the step that sets the learning rate of each parameter group.

    Args:
        optimizer: the optimizer.
        base_lrs: peak learning rate, or one per group.
        warmup_length: steps of warm-up, see `cosine_factor`.
        steps: steps of the run.

    Raises:
        ValueError: if there are not as many rates as groups.
    """
    count = len(optimizer.param_groups)
    peaks = base_lrs if isinstance(base_lrs, list) else [base_lrs] * count
    if len(peaks) != count:
        raise ValueError(f"expected {count} learning rates, one per group, got {len(peaks)}")

    def set_rate(step: int) -> None:  # loading a state replaces the optimizer's groups
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine_factor(step, warmup_length, steps)

    return set_rate
