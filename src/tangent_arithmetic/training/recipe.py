"""The training recipe of one task."""

from __future__ import annotations

from dataclasses import dataclass

from tangent_arithmetic.runtime.compute import Precision


@dataclass(frozen=True)
class Recipe:
    """How one task is fine-tuned.

    Attributes:
        lr: peak learning rate.
        epochs: passes over the training set.
        batch_size: images of a micro-step, over all processes.
        num_grad_accumulation: micro-steps of an optimizer step.
        warmup_length: optimizer steps of linear warm-up.
        wd: weight decay.
        ls: label smoothing.
        precision: "fp32", or "bf16" for autocast over float32 weights.
    """

    lr: float
    epochs: int
    batch_size: int
    num_grad_accumulation: int
    warmup_length: int
    wd: float
    ls: float
    precision: Precision = "fp32"
