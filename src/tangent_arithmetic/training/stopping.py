"""Measurements during a run, and its end at a target or when validation no longer gains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CHECKS = 16  # of a run that may end early
WATCHED = 4  # of a run that is watched, the one after its last step included


@dataclass
class Stopping:
    """Measures an accuracy several times a run, and decides from it whether the run is done.

    Attributes:
        measure: the accuracy of the weights as they are, on images that are not trained on; called
            with the number of steps done, on all ranks.
        target: accuracy that is enough; None for none.
        patience: measurements in a row without a gain, after which a run ends; None for no end.
        checks: measurements of a whole run, the one after its last step included, which is not
            made here; 0 for none.
    """

    measure: Callable[[int], float]
    target: float | None = None
    patience: int | None = None
    checks: int = CHECKS
    best: float = float("-inf")
    without_gain: int = 0

    @property
    def decides(self) -> bool:
        """Whether the run may end early."""
        return self.target is not None or self.patience is not None

    def due(self, done: int, steps: int, settled: bool = True) -> bool:
        """Whether to measure after a step that is not the last one.

        Args:
            done: steps done.
            steps: of the run.
            settled: whether the weights are what the run would end with: the mean of iterates, if
                it has one. Before, nothing can be decided.
        """
        if self.decides and not settled:
            return False
        return done < steps and done * self.checks // steps > (done - 1) * self.checks // steps

    def __call__(self, done: int) -> bool:
        """Measures, and returns whether the run is done."""
        value = self.measure(done)
        self.without_gain = 0 if value > self.best else self.without_gain + 1
        self.best = max(self.best, value)
        reached = self.target is not None and value >= self.target
        return reached or (self.patience is not None and self.without_gain >= self.patience)

    def state_dict(self) -> dict[str, Tensor]:
        """What an exact resume needs."""
        return {"seen": torch.tensor([self.best, self.without_gain], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state_dict`."""
        if state:
            best, without_gain = state["seen"].tolist()
            self.best, self.without_gain = best, int(without_gain)
