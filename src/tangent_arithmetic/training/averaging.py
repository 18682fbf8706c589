r"""The mean of the last iterates of a run.

A linear model's outputs are affine in its weights, so the mean of its weights has the mean of the
outputs, exactly. It does not bounce as the last iterate does, so the learning rate need not fall.
Statistics of batch norms are averaged along with the weights.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn


class TailMean:
    """The running mean of weights over the last steps of a run; one copy of them.

    Args:
        weights: parameters and buffers, by name.
        share: of the run's steps, those at its end that are averaged, at least one; 0 for none.
        steps: steps of the run.
    """

    def __init__(self, weights: Mapping[str, Tensor], share: float, steps: int) -> None:
        self.weights = dict(weights)
        self.first = steps - math.ceil(share * steps)  # steps before the averaged ones
        self.mean = dict[str, Tensor]()
        self.count = 0
        self._average = get_swa_multi_avg_fn()

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Takes the iterate after `done` steps into the mean."""
        if done <= self.first:
            return
        now = [value.detach() for value in self.weights.values()]
        if self.mean:
            self._average(list(self.mean.values()), now, self.count)
        else:
            copies = (value.clone() for value in now)
            self.mean = dict(zip(self.weights, copies, strict=True))
        self.count += 1

    @property
    def begun(self) -> bool:
        """Whether the mean is of something."""
        return bool(self.mean)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """The weights at the mean, and back at the iterate on exit."""
        iterate = {name: v.detach().clone() for name, v in self.weights.items() if self.begun}
        self.place()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in iterate.items():
                    self.weights[name].copy_(value)

    @torch.no_grad()
    def place(self) -> None:
        """Sets the weights to the mean; leaves them where nothing has been averaged."""
        for name, value in self.mean.items():
            self.weights[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The mean and the number of its iterates, as tensors."""
        return {**self.mean, "count": torch.tensor(self.count)} if self.mean else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state_dict`."""
        self.count = int(state["count"]) if state else 0
        self.mean = {
            name: state[name].to(value.device, copy=True)
            for name, value in (self.weights.items() if state else ())
        }
