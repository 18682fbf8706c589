"""Dual numbers: values with tangents, and how functionals act on them.

They are the dual tensors of PyTorch's forward AD, so operations without a rule (views, in-place
operations, a user's `autograd.Function`) keep PyTorch's exact semantics. A `TorchFunctionMode`
intercepts each functional; if there is a rule, it computes the value from values only, as in the
ordinary model, and the tangent separately, outside the autograd graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.backends import differentiable
from tangent_arithmetic.tangent.outputs import differentiable_tensors
from tangent_arithmetic.tangent.plain import named, operation
from tangent_arithmetic.tangent.replay import random_states, set_random_states
from tangent_arithmetic.tangent.reverse import by_reverse
from tangent_arithmetic.tangent.rules import COMPOSITES, RULES, keywords
from tangent_arithmetic.tangent.state import has_tangent, unpack
from tangent_arithmetic.tangent.weights import NeedsForwardAD

IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow")} | {"__setitem__"}
MORE = "_tangents_after_the_first"  # attribute of a dual tensor with several tangents


DIFFERENTIATION = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
PYTORCHS = {"aten", "prim", "prims", "quantized"}  # operators whose forward AD PyTorch answers for


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
        primal, tangent = unpack(value)
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
        if func in DIFFERENTIATION or peek_interpreter_stack() is not None:
            raise NeedsForwardAD("it differentiates, or uses torch.func, in its forward pass")
        for kind in types:  # a subclass of Tensor translates into functionals of plain tensors
            if _translates(kind):
                with self:
                    return kind.__torch_function__(func, types, args, kwargs)
        if func in COMPOSITES:
            with self:
                out = COMPOSITES[func](*args, **kwargs)
            return self.native(func, args, kwargs) if out is NotImplemented else out
        rule = RULES.get(func) or RULES.get(qualified_name(func) or "")
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
        if any(dual.is_complex() for dual in pairs.values()):
            return self.native(func, args, kwargs)  # the kernels of rules conjugate
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
        """Evaluates a functional by PyTorch's own forward AD, or by its backward pass."""
        try:
            with differentiable(func):
                if self.count > 1:
                    return self._native_shared(func, args, kwargs)
                out = func(*args, **kwargs)
                self._check_not_lost(func, (args, kwargs), out)
        except NotImplementedError as error:
            if self.count > 1:
                raise CannotShare(f"{operation(func)} has no forward-mode derivative") from error
            out = self.by_backward(func, args, kwargs)
            if out is NotImplemented:
                raise named(error, func) from error
        return self._without_graph(out) if self.learnt else out

    def by_backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional by its backward pass; NotImplemented if that is impossible."""
        return NotImplemented if _in_place(func, kwargs) else by_reverse(func, args, kwargs)

    def _check_not_lost(self, func: Callable[..., Any], inputs: Any, out: Any) -> None:
        """Raises if a sparse output, or an operator of another library, discards tangents."""
        sparse = isinstance(out, Tensor) and out.layout is not torch.strided
        name = qualified_name(func)
        if not sparse and (name is None or name.split("::")[0] in PYTORCHS):
            return
        results = list(differentiable_tensors(out))
        lost = results and not any(map(has_tangent, results))
        if lost and any(map(has_tangent, _tensors(inputs))):
            raise NotImplementedError(
                f"{name or operation(func)} has no forward AD here: its output lost the tangent."
            )

    def _without_graph(self, out: Any) -> Any:
        """The output with detached tangents, which are never differentiated."""

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            primal, tangent = unpack(value)
            if tangent is None or not tangent.requires_grad:
                return value
            return forward_ad.make_dual(primal, tangent.detach())

        if isinstance(out, Tensor):
            return cut(out)
        plain = not isinstance(out, tuple | list | dict) or isinstance(out, torch.Size)
        return out if plain else pytree.tree_map(cut, out)

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
        if not any(not hasattr(v, MORE) for v in differentiable_tensors(outputs)):
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
                tangents.append(unpack(value)[1])
        for value, tangents in zip(outputs, more, strict=True):
            if unpack(value)[1] is not None:
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
    if tangent.layout is not torch.strided:
        return tangent
    place = tangent.untyped_storage().data_ptr()
    others = (t for tangents in inputs for t in tangents if t.layout is torch.strided)
    return (
        tangent.clone() if any(place == t.untyped_storage().data_ptr() for t in others) else tangent
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]


@functools.cache
def _translates(kind: Any) -> bool:
    """Whether a subclass of Tensor has a `__torch_function__` of its own."""
    own = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    ordinary: Any = Tensor.__torch_function__
    return own not in (ordinary.__func__, torch._C._disabled_torch_function_impl)


def qualified_name(func: object) -> str | None:
    """`library::name` of an operator of the dispatcher; None for other functions."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func.name()).split(".")[0]
    if isinstance(func, torch._ops.OpOverloadPacket):
        return str(func._qualified_op_name)
    return None


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
