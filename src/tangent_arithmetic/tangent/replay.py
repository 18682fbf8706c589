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
    """A copy of the current random states and of tensors that a pass may change.

    Args:
        buffers: batch statistics and the like.
        inputs: the pass's inputs.
    """

    def __init__(self, buffers: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> None:
        # batch normalisation updates its statistics without incrementing their version
        self._buffers = [(tensor, tensor.clone()) for tensor in buffers]
        self._inputs = [(tensor, tensor.clone(), tensor._version) for tensor in inputs]
        self._states = random_states()

    def restore(self) -> None:
        """Restores the random states and the tensors."""
        with torch.no_grad():
            for tensor, value in self._buffers:
                tensor.copy_(value)
        self.restore_inputs()

    def restore_inputs(self) -> None:
        """Restores the random states and the inputs that have been changed in place."""
        set_random_states(self._states)
        with torch.no_grad():
            for tensor, value, version in self._inputs:
                if tensor._version != version:
                    tensor.copy_(value)
