"""Saves and restores the state that a pass changes, so that it can be repeated exactly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """The states of PyTorch's random number generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restores the states of the generators."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


class Replay:
    """A copy of the current random states and of some tensors.

    Args:
        tensors: tensors that a pass may modify in place, such as batch statistics.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # batch normalisation updates its statistics without incrementing their version
        self._saved = [(tensor, tensor.clone()) for tensor in tensors]
        self._states = random_states()

    def restore(self) -> None:
        """Restores the random states and the tensors."""
        set_random_states(self._states)
        with torch.no_grad():
            for tensor, value in self._saved:
                tensor.copy_(value)
