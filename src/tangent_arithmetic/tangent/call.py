"""What is differentiated: a module with its weights, directions and inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.replay import Replay
from tangent_arithmetic.tangent.weights import Tangents, swapped, usable


@dataclass(frozen=True)
class Call:
    """A call of a module, to be differentiated.

    Args:
        model: the module.
        values: theta0 and buffers by name; missing tensors are the module's own.
        vectors: the directions.
        args: inputs of the module.
        kwargs: keyword inputs of the module.
    """

    model: nn.Module
    values: Mapping[str, Tensor]
    vectors: Sequence[Tangents]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's own parameters; inside a pass others take their place."""
        return dict(self.model.named_parameters())

    def __post_init__(self) -> None:
        _ = self.parameters  # not read for the first time inside a pass

    def replay(self) -> Replay:
        """A copy of all that the call may change: random states, buffers, inputs."""
        buffers = (self.values.get(name, b) for name, b in self.model.named_buffers())
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        attributes = (v for module in self.model.modules() for v in vars(module).values())
        inputs = (v for v in leaves if isinstance(v, Tensor))
        return Replay(buffers, inputs, sources=(*leaves, *attributes))

    def value(self, name: str) -> Tensor:
        """theta0 of a name, a constant."""
        given = self.values.get(name)
        return usable(self.parameters[name].detach()) if given is None else given

    def primal(self, change: Callable[[str, Tensor], Tensor] = lambda _, value: value) -> Any:
        """The module's output without tangents, at changed weights if asked."""
        names = self.parameters
        with swapped(self.model, names, self.values, lambda name: change(name, self.value(name))):
            return self.model(*self.args, **self.kwargs)
