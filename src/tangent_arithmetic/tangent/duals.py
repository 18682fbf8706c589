"""Dual numbers: values with tangents, and how functionals act on them.

They are the dual tensors of PyTorch's forward AD, so operations without a rule (views, in-place
operations, a user's `autograd.Function`) keep PyTorch's exact semantics. A `TorchFunctionMode`
intercepts each functional; if there is a rule, it computes the value from values only, as in the
ordinary model, and the tangent separately, outside the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.plain import differentiable, named
from tangent_arithmetic.tangent.replay import random_states, set_random_states
from tangent_arithmetic.tangent.rules import COMPOSITES, RULES, keywords

IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow")} | {"__setitem__"}
MORE = "_tangents_after_the_first"  # attribute of a dual tensor with several tangents


class CannotShare(Exception):
    """This module cannot propagate several tangents in one pass."""


class Duals(TorchFunctionMode):
    """Applies the rules to all functionals of dual tensors.

    Args:
        count: number of tangents per dual tensor.
        learnt: whether the primal pass is recorded for a backward pass.
    """

    def __init__(self, count: int, learnt: bool) -> None:
        super().__init__()
        self.count, self.learnt = count, learnt

    def pair(self, primal: Tensor, tangents: Sequence[Tensor | None]) -> Tensor:
        """The dual tensor of a value and its tangents; None is a zero tangent."""
        if all(tangent is None for tangent in tangents):
            return primal
        first, *others = (
            torch.zeros_like(primal) if t is None else t.to(primal.dtype).detach() for t in tangents
        )
        dual: Tensor = forward_ad.make_dual(primal, first)
        if self.count > 1:
            setattr(dual, MORE, others)
        return dual

    def split(self, value: object) -> tuple[Any, list[Tensor] | None]:
        """The value and tangents of an argument; None for no tangents."""
        if not isinstance(value, Tensor):
            return value, None
        primal, tangent = forward_ad.unpack_dual(value)
        if tangent is None or tangent._is_zerotensor():
            return value if tangent is None else primal, None
        if self.count == 1:
            return primal, [tangent]
        more = getattr(value, MORE, None)
        if more is None:
            raise CannotShare("an operation without a rule keeps only one tangent")
        return primal, [tangent, *more]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITES:
            with self:
                out = COMPOSITES[func](*args, **kwargs)
            return self.native(func, args, kwargs) if out is NotImplemented else out
        rule = RULES.get(func)
        if rule is None or not _knows(rule, kwargs):
            return self.native(func, args, kwargs)
        return self.apply(rule, func, args, kwargs)

    def apply(
        self,
        rule: Callable[..., Any],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Evaluates a functional by its rule."""
        tangents: dict[int, list[Tensor]] = {}
        pairs: dict[int, Tensor] = {}  # primal -> its dual tensor

        def value_of(arg: Any) -> Any:
            primal, parts = self.split(arg)
            if parts is not None:
                tangents[id(primal)], pairs[id(primal)] = parts, arg
            return primal

        values = tuple(value_of(arg) for arg in args)
        named = {name: value_of(arg) for name, arg in kwargs.items()}
        if not tangents:
            return func(*args, **kwargs)
        result = rule(*values, **named)
        if result is NotImplemented:
            return self.native(func, args, kwargs)
        out, push = result
        with torch.no_grad():
            steps = []
            for k in range(self.count):

                def d(primal: Any, k: int = k) -> Tensor | None:
                    parts = tangents.get(id(primal))
                    return None if parts is None else parts[k]

                steps.append(_fresh(push(d), tangents.values()))
            if id(out) in pairs:  # in place
                for tangent, step in zip(tangents[id(out)], steps, strict=True):
                    assert step is not None
                    tangent.copy_(step)
                return pairs[id(out)]
        return self.pair(out, steps)

    def native(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional by PyTorch's own forward AD."""
        try:
            with differentiable(func):
                if self.count > 1:
                    return self._native_shared(func, args, kwargs)
                out = func(*args, **kwargs)
        except NotImplementedError as error:
            raise named(error, func) from error
        return self._without_graph(out) if self.learnt else out

    def _without_graph(self, out: Any) -> Any:
        """The output with detached tangents, which are never differentiated."""

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            primal, tangent = forward_ad.unpack_dual(value)
            if tangent is None or not tangent.requires_grad:
                return value
            return forward_ad.make_dual(primal, tangent.detach())

        if isinstance(out, Tensor):
            return cut(out)
        return pytree.tree_map(cut, out) if isinstance(out, tuple | list | dict) else out

    def _native_shared(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional once per tangent, with identical random numbers."""
        inputs, spec = pytree.tree_flatten((args, kwargs))
        parts = [self.split(value) for value in inputs]
        if all(tangents is None for _, tangents in parts):
            return func(*args, **kwargs)
        if _in_place(func, kwargs) or _keeps_statistics(func, args, kwargs):
            raise CannotShare(f"{getattr(func, '__name__', func)} modifies a tensor in place")
        states = random_states()
        out = func(*args, **kwargs)
        outputs = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        if not any(v.is_floating_point() and not hasattr(v, MORE) for v in outputs):
            return out
        more: list[list[Tensor | None]] = [[] for _ in outputs]
        for k in range(1, self.count):
            new_args, new_kwargs = pytree.tree_unflatten(
                [
                    primal if tangents is None else forward_ad.make_dual(primal, tangents[k])
                    for primal, tangents in parts
                ],
                spec,
            )
            set_random_states(states)
            other = func(*new_args, **new_kwargs)
            for tangents, value in zip(more, pytree.tree_leaves(other), strict=False):
                tangents.append(forward_ad.unpack_dual(value).tangent)
        for value, tangents in zip(outputs, more, strict=True):
            if forward_ad.unpack_dual(value).tangent is not None:
                others = [torch.zeros_like(value) if t is None else t for t in tangents]
                setattr(value, MORE, others)
        return out


def _knows(rule: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a rule takes these keywords; some functionals have several names for an argument."""
    names = keywords(rule)
    return "out" not in kwargs and (names is None or kwargs.keys() <= names)


def _fresh(tangent: Tensor | None, inputs: Iterable[Sequence[Tensor]]) -> Tensor | None:
    """A tangent that shares no memory with the inputs', so that it may be modified in place."""
    if tangent is None:
        return None
    place = tangent.untyped_storage().data_ptr()
    shared = any(place == t.untyped_storage().data_ptr() for tangents in inputs for t in tangents)
    return tangent.clone() if shared else tangent


def _keeps_statistics(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a functional is a normalisation that may update running statistics."""
    if func not in (F.batch_norm, F.instance_norm):
        return False
    return (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None


def _in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    method = name.endswith("_") and not name.endswith("__")
    return method or name in IN_PLACE or bool(kwargs.get("inplace")) or "out" in kwargs
