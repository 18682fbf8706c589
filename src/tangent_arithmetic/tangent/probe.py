"""A pseudo-random direction for checks, of the size of the weights, which is never stored."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PERIOD = 65537  # of the noise, which is repeated: drawing numbers would cost more than a pass


@functools.cache
def _noise(device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(PERIOD, generator=random).to(device)


class Probe(Mapping[str, Tensor]):
    """A direction whose size in each tensor is that of the weights.

    Args:
        names: the parameters that it moves.
        value: returns a parameter's value.
        scale: a number that multiplies the direction; if it requires grad, its gradient is that of
            a loss along the direction.
    """

    def __init__(
        self, names: Iterable[str], value: Callable[[str], Tensor], scale: Tensor | None = None
    ) -> None:
        self._names = {name: None for name in names if value(name).is_floating_point()}
        self._value, self._scale = value, scale

    def direction(self, name: str) -> Tensor:
        """The direction of a parameter, computed on each call."""
        value = self._value(name).detach()
        noise = _noise(value.device).roll(zlib.crc32(name.encode()) % PERIOD)
        flat = noise.repeat(-(-value.numel() // PERIOD))[: value.numel()]
        size = value.to(torch.float32).square().mean().sqrt() if value.numel() else noise[0]
        size = torch.where(size > 1e-8, size, 0.02)  # such as the zeros that adapters start from
        return (flat * size).reshape(value.shape).to(value.dtype)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._scale is None:
            return self.direction(name)
        scaled: Tensor = _Scaled.apply(self._scale, self, name)
        return scaled

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Scaled(torch.autograd.Function):
    """The direction times one; the gradient goes to the number."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, probe: Probe, name: str) -> Tensor:
        ctx.probe, ctx.name = probe, name
        return probe.direction(name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        direction = ctx.probe.direction(ctx.name)
        wide = torch.float32 if grad.device.type == "mps" else torch.float64
        return (grad.to(wide) * direction).sum(), None, None
