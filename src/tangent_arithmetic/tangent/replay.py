"""What a pass changes besides its output, so that it can be run again as if for the first time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """The states of the generators that operations draw from, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Puts the generators back."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


class Replay:
    """The random states and some tensors, as they are now.

    Args:
        tensors: what a pass may change in place, such as batch statistics.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # batch normalisation changes its statistics without raising their version
        self._kept = [(tensor, tensor.clone()) for tensor in tensors]
        self._states = random_states()

    def restore(self) -> None:
        """Puts them back."""
        set_random_states(self._states)
        with torch.no_grad():
            for tensor, value in self._kept:
                tensor.copy_(value)
