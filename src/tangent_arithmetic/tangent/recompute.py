r"""Activation checkpointing: segments whose activations are computed again in the backward pass.

In a pass that is differentiated, `torch.utils.checkpoint` runs a segment with its tangents but
without a graph, and keeps the segment's inputs alone. The gradient \(J^\top g\) does not depend on
the tangents: the backward pass runs the ordinary segment at \(\theta_0\) and its reverse mode.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import backends
from tangent_arithmetic.tangent.call import Call
from tangent_arithmetic.tangent.duals import Duals
from tangent_arithmetic.tangent.outputs import differentiable_tensors
from tangent_arithmetic.tangent.replay import Replay, random_states, set_random_states
from tangent_arithmetic.tangent.state import (
    DEPTH,
    PLAIN,
    attributes,
    enclosed,
    has_tangent,
    tensors_in,
)
from tangent_arithmetic.tangent.weights import AtTheta0, leaf, swapped

Function = Callable[..., Any]


class Segments:
    """The checkpointed segments of one pass.

    Args:
        call: the call that is differentiated.
        duals: how the pass represents values with tangents.
    """

    def __init__(self, call: Call, duals: Duals) -> None:
        self._call, self._duals = call, duals
        self._names: dict[str, None] = {}

    def note(self, name: str) -> None:
        """Notes that the module reads a weight."""
        self._names[name] = None

    def recomputed(self, cached: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Inside the block `torch.utils.checkpoint` records segments in the backward pass only.

        Args:
            cached: the dual weights that the pass keeps; those read in a segment have no graph.
        """
        return backends.checkpointing(functools.partial(self._run, cached))

    def _run(
        self, cached: dict[str, Tensor], function: Function, args: Any, kwargs: Any, contexts: bool
    ) -> Any:
        while isinstance(function, functools.partial):
            args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
            function = function.func
        if not torch.is_grad_enabled() or contexts or _captures(function, (args, kwargs)):
            return backends.activations_kept(function, args, kwargs)
        segment, before = _Segment(self._call, self._duals, function, (args, kwargs)), self._names
        self._names = {}
        cached.clear()
        with torch.no_grad():
            out = function(*args, **kwargs)
        cached.clear()
        names, self._names = list(self._names), before
        return segment.attach(names, self._duals, out)


class _Segment:
    """A function with the inputs that it takes to run it again at theta0."""

    def __init__(self, call: Call, duals: Duals, function: Function, inputs: Any) -> None:
        self._call, self._function = call, function
        leaves, self._spec = pytree.tree_flatten(inputs)
        self._tensors = [duals.split(v)[0] for v in leaves if isinstance(v, Tensor)]
        self._constants = [None if isinstance(v, Tensor) else v for v in leaves]
        self._holes = [k for k, v in enumerate(leaves) if isinstance(v, Tensor)]
        self._states, self._autocast = random_states(), _autocast()
        self._names: list[str] = []  # the weights that learn
        self._places: list[int] = []  # of the differentiable leaves of the output

    def attach(self, names: Sequence[str], duals: Duals, out: Any) -> Any:
        """The output of the segment, with the graph of its recomputation.

        Args:
            names: the weights that the segment has read.
            duals: represents values with tangents.
            out: the output, without a graph.
        """
        direction = self._call.vectors[0]
        self._names = [n for n in names if n in direction and leaf(direction, n).requires_grad]
        weights = [AtTheta0.apply(leaf(direction, n), self._call.value(n)) for n in self._names]
        leaves, spec = pytree.tree_flatten(out)
        pairs = [duals.split(value) for value in leaves]
        self._places = [k for k, (v, _) in enumerate(pairs) if list(differentiable_tensors(v))]
        values = [pairs[k][0].detach() for k in self._places]
        tensors, self._tensors = self._tensors, []
        for k, value in zip(
            self._places, _Recomputed.apply(self, values, *tensors, *weights), strict=True
        ):
            leaves[k] = duals.pair(value, pairs[k][1])
        return pytree.tree_unflatten(leaves, spec)

    def gradients(self, saved: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor | None]:
        r"""\(J^\top g\), by the reverse mode of the segment at theta0.

        Args:
            saved: the inputs that are tensors, then the weights that learn.
            grads: g for each differentiable output.

        Returns:
            The gradients with respect to `saved`.
        """
        inputs = [v.detach().requires_grad_(v.requires_grad) for v in saved]
        weights = dict(zip(self._names, inputs[len(self._holes) :], strict=True))
        leaves = list(self._constants)
        for k, value in zip(self._holes, inputs, strict=False):
            leaves[k] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        call, buffers = self._call, self._call.model.named_buffers()
        now = Replay(call.values.get(name, buffer) for name, buffer in buffers)

        def weight(name: str) -> Tensor:
            return weights[name] if name in weights else call.value(name)

        with contextlib.ExitStack() as stack:
            stack.callback(now.restore)
            stack.enter_context(backends.one_pass(backward=True))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(swapped(call.model, call.parameters, call.values, weight))
            for device, settings in self._autocast.items():
                stack.enter_context(torch.autocast(device, **settings))
            set_random_states(self._states)
            outputs = pytree.tree_leaves(self._function(*args, **kwargs))
            pairs = [(outputs[k], g) for k, g in zip(self._places, grads, strict=True)]
            ends, slopes = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
            learnt = [v for v in inputs if v.requires_grad]
            found = iter(torch.autograd.grad(ends, learnt, slopes, allow_unused=True))
        return [next(found) if v.requires_grad else None for v in inputs]


class _Recomputed(torch.autograd.Function):
    """Values whose graph is recorded in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, segment: _Segment, values: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.segment = segment
        ctx.save_for_backward(*inputs)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *ctx.segment.gradients(ctx.saved_tensors, grads)


def _captures(function: Function, inputs: Any) -> bool:
    """Whether a function uses activations that are not tensors among its inputs."""
    objects = [v for v in pytree.tree_leaves(inputs) if not isinstance(v, Tensor)]
    tensors = (t for value in (function, *objects) for t in _within_reach(value))
    return any(has_tangent(t) or (t.requires_grad and not t.is_leaf) for t in tensors)


def _within_reach(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors in a value and in what it refers to; of modules all but the weights."""
    yield from tensors_in(value)
    if depth == 0 or isinstance(value, PLAIN):
        return
    of_module = isinstance(value, nn.Module)
    parts = [home[key[1]] for key, home in attributes(value)] if of_module else enclosed(value)
    for part in parts:
        yield from _within_reach(part, depth - 1)


def _autocast() -> dict[str, dict[str, Any]]:
    """The settings of autocast by type of device, where it is on."""
    kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    cache = torch.is_autocast_cache_enabled()
    return {
        kind: {"dtype": torch.get_autocast_dtype(kind), "cache_enabled": cache} for kind in kinds
    }
