"""Dual numbers: pairs of a value and its tangents, and what functionals make of them.

The pairs are those of PyTorch's forward AD, so that whatever no rule covers (views, in-place
operations, a user's `autograd.Function`) keeps PyTorch's own exact meaning. A
`TorchFunctionMode` sees each functional; where there is a rule it computes the value on values
alone, as the ordinary model does, and the tangent beside it, outside of the graph.
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
MORE = "_tangents_after_the_first"  # where a pair of several tangents keeps the others


class CannotShare(Exception):
    """Several tangents cannot go through this module side by side."""


class Duals(TorchFunctionMode):
    """Applies the rules to whatever functional meets a pair.

    Args:
        count: tangents of each pair.
        learnt: whether the primal pass is recorded for a backward pass.
    """

    def __init__(self, count: int, learnt: bool) -> None:
        super().__init__()
        self.count, self.learnt = count, learnt

    def pair(self, primal: Tensor, tangents: Sequence[Tensor | None]) -> Tensor:
        """A value with its tangents; None is zero."""
        if all(tangent is None for tangent in tangents):
            return primal
        known = [
            torch.zeros_like(primal) if t is None else t.to(primal.dtype).detach() for t in tangents
        ]
        dual = forward_ad.make_dual(primal, known[0])
        if self.count > 1:
            setattr(dual, MORE, known[1:])
        return dual

    def split(self, value: Any) -> tuple[Any, list[Tensor] | None]:
        """A value and its tangents; None if it has none."""
        if not isinstance(value, Tensor):
            return value, None
        primal, tangent = forward_ad.unpack_dual(value)
        if tangent is None or tangent._is_zerotensor():
            return value if tangent is None else primal, None
        if self.count == 1:
            return primal, [tangent]
        more = getattr(value, MORE, None)
        if more is None:
            raise CannotShare("an operation that our rules do not see keeps one tangent only")
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
        """The functional by its rule."""
        tangents: dict[int, list[Tensor]] = {}
        pairs: dict[int, Tensor] = {}  # primal -> the pair that it is of

        def value_of(arg: Any) -> Any:
            primal, found = self.split(arg)
            if found is not None:
                tangents[id(primal)], pairs[id(primal)] = found, arg
            return primal

        values = tuple(value_of(arg) for arg in args)
        named = {name: value_of(arg) for name, arg in kwargs.items()}
        if not tangents:
            return func(*args, **kwargs)
        answer = rule(*values, **named)
        if answer is NotImplemented:
            return self.native(func, args, kwargs)
        out, push = answer
        with torch.no_grad():
            found = []
            for k in range(self.count):

                def d(primal: Any, k: int = k) -> Tensor | None:
                    known = tangents.get(id(primal))
                    return None if known is None else known[k]

                found.append(_fresh(push(d), tangents.values()))
            if id(out) in pairs:  # in place
                for own, new in zip(tangents[id(out)], found, strict=True):
                    assert new is not None
                    own.copy_(new)
                return pairs[id(out)]
        return self.pair(out, found)

    def native(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """The functional by PyTorch's own forward AD."""
        try:
            with differentiable(func):
                if self.count > 1:
                    return self._native_shared(func, args, kwargs)
                out = func(*args, **kwargs)
        except NotImplementedError as error:
            raise named(error, func) from error
        return self._without_graph(out) if self.learnt else out

    def _without_graph(self, out: Any) -> Any:
        """The output with tangents that are constants: nobody differentiates through them."""

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
        """The functional once a tangent, each time as if for the first time."""
        inputs, spec = pytree.tree_flatten((args, kwargs))
        parts = [self.split(value) for value in inputs]
        if all(tangents is None for _, tangents in parts):
            return func(*args, **kwargs)
        if _in_place(func, kwargs) or _keeps_statistics(func, args, kwargs):
            raise CannotShare(f"{getattr(func, '__name__', func)} works in place")
        states = random_states()
        out = func(*args, **kwargs)
        outputs = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        if not any(v.is_floating_point() and not hasattr(v, MORE) for v in outputs):
            return out
        more: list[list[Tensor | None]] = [[] for _ in outputs]
        for k in range(1, self.count):
            again, others = pytree.tree_unflatten(
                [
                    primal if tangents is None else forward_ad.make_dual(primal, tangents[k])
                    for primal, tangents in parts
                ],
                spec,
            )
            set_random_states(states)
            other = func(*again, **others)
            for found, value in zip(more, pytree.tree_leaves(other), strict=False):
                found.append(forward_ad.unpack_dual(value).tangent)
        for value, found in zip(outputs, more, strict=True):
            tangent = forward_ad.unpack_dual(value).tangent
            if tangent is not None:
                setattr(value, MORE, [torch.zeros_like(value) if t is None else t for t in found])
        return out


def _knows(rule: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a rule takes these keywords; some functionals have several names for an argument."""
    known = keywords(rule)
    return "out" not in kwargs and (known is None or kwargs.keys() <= known)


def _fresh(tangent: Tensor | None, known: Iterable[Sequence[Tensor]]) -> Tensor | None:
    """A tangent in memory of its own: what works in place on the output must not reach others."""
    if tangent is None:
        return None
    place = tangent.untyped_storage().data_ptr()
    shared = any(
        place == own.untyped_storage().data_ptr() for tangents in known for own in tangents
    )
    return tangent.clone() if shared else tangent


def _keeps_statistics(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a normalisation may update running statistics."""
    if func not in (F.batch_norm, F.instance_norm):
        return False
    return (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None


def _in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    method = name.endswith("_") and not name.endswith("__")
    return method or name in IN_PLACE or bool(kwargs.get("inplace")) or "out" in kwargs
