"""Validation accuracy during fine-tuning, measured without disturbing the run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.run.models import split_of
from tangent_arithmetic.run.run import Run

MOST = 1000  # pictures, so that it costs little beside the training
NAMES = {"top1": "accuracy", "map": "mean average precision"}


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Restores the state of Python's, NumPy's and PyTorch's generators at the end."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


class Validation:
    """Accuracies on a task's validation split: `--sample` pictures of it, or at most `MOST`.

    Args:
        run: the run.
        task: the task, without Val.
        encoder: gives the preprocessing.
    """

    def __init__(self, run: Run, task: str, encoder: Encoder) -> None:
        self.run, self.task, self.encoder = run, task, encoder
        self.size = len(run.data.dataset(f"{task}Val").test)
        self.metric = ""
        self.values: dict[str, float] = {}

    @cached_property
    def _split(self) -> Split:
        count = self.run.config.sample or MOST
        small = {"sample": count if count < self.size else None, "feature_cache": False}
        return split_of(self.run.with_(**small), self.encoder, f"{self.task}Val")

    def measure(self, when: str, encoder: Encoder) -> dict[str, float]:
        """Measures an encoder, on all ranks; it is in evaluation mode afterwards.

        Args:
            when: such as "before"; the name of the value.
            encoder: the encoder, standard or linear.

        Returns:
            The value, by a name for plots.
        """
        with kept_generators(self.run.device):
            found: dict[str, Any] = {**self._split.accuracy(encoder)}
        self.metric = next(name for name in found if name != "num_images")
        self.values[when] = float(found[self.metric])
        return {f"validation_{self.metric}": self.values[when]}

    @property
    def facts(self) -> dict[str, object]:
        """The accuracies by name, with their metric and number of pictures."""
        count = self._split.num_images
        return {"metric": self.metric, "num_images": count, **self.values}

    def told(self) -> str:
        """The accuracies before and after, for the log."""
        before, after = (f"{100 * self.values[when]:.1f}" for when in ("before", "after"))
        count, of = self._split.num_images, f" of {self.size}"
        part = f"{count}{of if count != self.size else ''} examples"
        name = NAMES.get(self.metric, self.metric)
        return f"validation {name} {before} % before and {after} % after, on {part}"
