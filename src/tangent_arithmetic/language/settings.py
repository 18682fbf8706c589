"""The settings of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from tangent_arithmetic.training.recipe import Recipe

Mode = Literal["standard", "linear", "posthoc"]
MODES: tuple[Mode, ...] = ("standard", "linear", "posthoc")


@dataclass(frozen=True)
class Settings:
    """What all experiments need.

    Attributes:
        model: the pre-trained model, by name or folder.
        save: folder of fine-tuned models.
        recipe: how they are fine-tuned.
        mode: standard or linear fine-tuning, or standard fine-tuning linearised afterwards.
        tasks: the tasks by name.
        finetuned: name of a vector -> model that is fine-tuned already, by name or folder.
        data: folder of the data sets, see `rows.py`; None for the hub.
        rows: the most rows of a split; None for all.
        length: tokens after which a text is cut.
        eval_batch_size: texts of a pass without gradients.
        coefs: the coefficients to try.
        seed: of fine-tuning, and of heads that a model lacks.
        device: where to compute.
    """

    model: str
    save: Path
    recipe: Recipe
    mode: Mode = "standard"
    tasks: tuple[str, ...] = ()
    finetuned: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    rows: int | None = None
    length: int = 512
    eval_batch_size: int = 16
    coefs: tuple[float, ...] = (0.0, 0.5, 1.0)
    seed: int = 0
    device: torch.device | str = "cpu"

    @property
    def trains_linear(self) -> bool:
        """Whether models are fine-tuned in their tangent space."""
        return self.mode == "linear"

    @property
    def applies_linear(self) -> bool:
        """Whether task vectors are applied in the tangent space."""
        return self.mode != "standard"
