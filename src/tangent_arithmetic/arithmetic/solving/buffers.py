"""Buffers that directions move, such as a batch norm's running mean and variance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tangent_arithmetic.storage.statedict import State

BATCH_NORM = inspect.signature(F.batch_norm)


def moving_buffers(module: nn.Module, vectors: Sequence[State]) -> list[str]:
    """The names of the buffers of a module that some direction moves."""
    return [
        name
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point()
        and any(name in tau and bool((tau[name] != 0).any()) for tau in vectors)
    ]


class OpenStatistics(TorchFunctionMode):
    """Batch norm in evaluation mode as arithmetic, so that its statistics have gradients."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        given = kwargs or {}
        if func is F.batch_norm:
            bound = BATCH_NORM.bind(*args, **given)
            bound.apply_defaults()
            if not bound.arguments["training"] and bound.arguments["running_mean"] is not None:
                return _normalised(**bound.arguments)
        return func(*args, **given)


def _normalised(
    input: Tensor,  # names are those of F.batch_norm
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    **_: Any,
) -> Tensor:
    shape = (1, -1, *(1 for _ in input.shape[2:]))
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    normal = (input - running_mean.reshape(shape)) * scale.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)
