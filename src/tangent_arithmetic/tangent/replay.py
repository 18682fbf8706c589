"""Saves and restores the state that a pass changes, so that it can be repeated exactly."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
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


def _rewinds(source: Any) -> list[Callable[[], Any]]:
    """What puts a source of random numbers back to its present state; none for other objects."""
    if source is random or isinstance(source, random.Random):
        return [functools.partial(source.setstate, source.getstate())]
    if isinstance(source, torch.Generator):
        return [functools.partial(source.set_state, source.get_state())]
    if source is np.random or isinstance(source, np.random.RandomState):
        return [functools.partial(source.set_state, source.get_state())]
    if isinstance(source, np.random.Generator):
        bits = source.bit_generator
        return [functools.partial(setattr, bits, "state", bits.state)]
    return []


def _once(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of `expand`, which share one place in memory."""
    if tensor.layout is torch.strided and not tensor.is_nested:
        for axis, stride in enumerate(tensor.stride()):
            tensor = tensor.narrow(axis, 0, 1) if stride == 0 < tensor.shape[axis] else tensor
    return tensor


class Replay:
    """A copy of the current random states and of tensors that a pass may change.

    Random states are those of PyTorch, of Python, of NumPy and of generators among the `sources`.

    Args:
        buffers: batch statistics and the like.
        inputs: the pass's inputs.
        sources: objects, some of which may be random number generators.
    """

    def __init__(
        self,
        buffers: Iterable[Tensor],
        inputs: Iterable[Tensor] = (),
        sources: Iterable[object] = (),
    ) -> None:
        # batch normalisation updates its statistics without incrementing their version
        self._buffers = [(tensor, _once(tensor).clone()) for tensor in buffers]
        self._inputs = [(tensor, _once(tensor).clone(), tensor._version) for tensor in inputs]
        self._states = random_states()
        own = (random, np.random, *sources)
        self._rewinds = [rewind for source in own for rewind in _rewinds(source)]

    def restore(self) -> None:
        """Restores the random states and the tensors."""
        for tensor, value in self._buffers:
            _write(tensor, value)
        self.restore_inputs()

    def restore_inputs(self) -> None:
        """Restores the random states and the inputs that have been changed in place."""
        set_random_states(self._states)
        for rewind in self._rewinds:
            rewind()
        for tensor, value, version in self._inputs:
            if tensor._version != version:
                _write(tensor, value)


def _write(tensor: Tensor, value: Tensor) -> None:
    """Writes an earlier value; graphs that have saved the tensor then remain valid."""
    with torch.no_grad():
        _once(tensor.data).copy_(value)
