"""How long to train on a data set whose epochs are not stated.

The papers train about 2,000 steps of 128 images on each task. So does this rule (a suite may state
other numbers), with at most `MOST_EPOCHS` passes, the papers' most, so that a small set is not
learned by heart; a tenth of the steps, at most the suite's number, is warm-up.

Source: epochs of arXiv:2212.04089 and arXiv:2305.12827.
"""

from __future__ import annotations

from dataclasses import dataclass

from tangent_arithmetic.data.suites import Suite

MOST_EPOCHS = 76  # DTD's


@dataclass(frozen=True)
class Budget:
    """The training of one data set.

    Attributes:
        images: number of training images.
        epochs: passes over them.
        steps: optimizer steps.
        warmup_length: of these, steps of warm-up.
        capped: whether more epochs would be needed for the wanted steps.
    """

    images: int
    epochs: int
    steps: int
    warmup_length: int
    capped: bool

    def __str__(self) -> str:
        reason = f", the most epochs for a set this small ({MOST_EPOCHS})" if self.capped else ""
        return (
            f"{self.images:,} training examples: {self.epochs} epoch{'s' * (self.epochs > 1)}, "
            f"{self.steps:,} steps, {self.warmup_length} of them warm-up{reason}"
        )


def budget(images: int, step_size: int, like: Suite, epochs: int | None = None) -> Budget:
    """The training of a data set.

    Args:
        images: number of training images.
        step_size: images per optimizer step.
        like: the suite that states about how many steps, and the most of them that are warm-up.
        epochs: passes over the images; None to follow from the steps.
    """
    per_epoch = max(1, -(-images // step_size))
    wanted = max(1, round(like.steps / per_epoch)) if epochs is None else epochs
    chosen = min(wanted, MOST_EPOCHS) if epochs is None else epochs
    total = chosen * per_epoch
    warmup = min(like.warmup_length, max(1, int(total * like.warmup_share)))
    return Budget(images, chosen, total, warmup, chosen < wanted)
