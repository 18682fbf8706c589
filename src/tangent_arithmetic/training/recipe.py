"""The training recipe of one task."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

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
        optimizer: a name of `OPTIMIZERS`.
        schedule: of the learning rate after warm-up, a name of `SCHEDULES`.
        averaging: share of the steps, at the end, whose iterates are averaged; 0 for none.
        image_share: of the images of all epochs, those that are trained on; the first ones.
    """

    lr: float
    epochs: int
    batch_size: int
    num_grad_accumulation: int
    warmup_length: int
    wd: float
    ls: float
    precision: Precision = "fp32"
    optimizer: str = "adamw"
    schedule: str = "cosine"
    averaging: float = 0.0
    image_share: float = 1.0

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of a run, at least one."""
        return max(1, round(self.image_share * self.epochs * steps_per_epoch))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The fields that have a default: what a checkpoint was made with that lacks them."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


def fast(recipe: Recipe, linear: bool) -> Recipe:
    """The recipe that needs fewer images: smaller batches, a constant rate, and averaged iterates.

    Chosen on validation on the embedded suite, see docs/fast.md; not known for other models.

    Args:
        recipe: the recipe that it replaces.
        linear: whether the model is linear, which bears a higher rate.
    """
    step_size = recipe.batch_size * recipe.num_grad_accumulation
    return replace(
        recipe,
        lr=recipe.lr * (3 if linear else 1),
        batch_size=max(1, step_size // 2),
        num_grad_accumulation=1,
        schedule="constant",
        averaging=0.5,
        image_share=0.5,
    )
