"""The device and the precision of a computation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError, shown

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Compute:
    """A device and a precision.

    Attributes:
        device: the device of modules and batches.
        precision: "fp32", or "bf16" for autocast with float32 weights.
    """

    device: torch.device
    precision: Precision = "fp32"

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Compute:
        """float32 on the device of these weights."""
        first = next(iter(weights.values()), None)
        return cls(torch.device("cpu") if first is None else first.device)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """A context that computes in this precision; weights stay float32."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def find_device(name: str | None = None) -> torch.device:
    """The device with this name; by default the first available of CUDA, MPS and CPU.

    In a process group, each local rank gets its own CUDA device.

    Raises:
        UsageError: if the name is unknown, or PyTorch finds no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device '{shown(name)}'; choose from cpu, cuda, cuda:N, mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device={device}, but this PyTorch sees no CUDA device; try --device=cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UsageError(
            f"--device={device}, but this PyTorch sees {torch.cuda.device_count()} CUDA devices, "
            "numbered from 0"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device=mps, but this PyTorch sees no MPS device; try --device=cpu")
    if device.type == "cuda" and device.index is None and ddp.world_size() > 1:
        device = torch.device("cuda", ddp.local_rank() % torch.cuda.device_count())
    return device
