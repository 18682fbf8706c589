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
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.backends import differentiable
from tangent_arithmetic.tangent.outputs import differentiable_tensors
from tangent_arithmetic.tangent.plain import named, operation
from tangent_arithmetic.tangent.reverse import by_reverse
from tangent_arithmetic.tangent.rules import COMPOSITES, RULES, keywords
from tangent_arithmetic.tangent.state import has_tangent, unpack
from tangent_arithmetic.tangent.weights import NeedsForwardAD

IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow")}
IN_PLACE |= {"__setitem__", "__set__"}

DIFFERENTIATION = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
DISCARD = {torch.scatter_reduce, Tensor.scatter_reduce}  # tangents of products, in PyTorch 2.14
PYTORCHS = {"aten", "prim", "prims", "quantized"}  # operators whose forward AD PyTorch answers for


class Duals(TorchFunctionMode):
    """Applies the rules to all functionals of dual tensors along one direction.

    Args:
        learnt: whether the primal pass is recorded for a backward pass.
    """

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.learnt = learnt

    def pair(self, primal: Tensor, tangent: Tensor | None) -> Tensor:
        """The dual tensor of a value and its tangent; None is a zero tangent."""
        if tangent is None:
            return primal
        dual: Tensor = forward_ad.make_dual(primal, tangent.to(primal.dtype).detach())
        return dual

    def split(self, value: object) -> tuple[Any, Tensor | None]:
        """The value and tangent of an argument; None for no tangent."""
        if not isinstance(value, Tensor):
            return value, None
        primal, tangent = unpack(value)
        if tangent is None or tangent._is_zerotensor():
            return value if tangent is None else primal, None
        return primal, tangent

    def weight(self, value: Tensor, tangents: Sequence[Tensor | None]) -> Tensor:
        """The dual tensor of a parameter; None is a zero tangent."""
        return self.pair(value, tangents[0])

    def tangents(self, value: object) -> tuple[Any, list[Tensor] | None]:
        """The value and its tangent along each direction; None for no tangents."""
        primal, tangent = self.split(value)
        return primal, None if tangent is None else [tangent]

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
        tangents: dict[int, Tensor] = {}
        pairs: dict[int, Tensor] = {}  # primal -> its dual tensor

        def value_of(arg: Any) -> Any:
            primal, tangent = self.split(arg)
            if tangent is not None:
                tangents[id(primal)], pairs[id(primal)] = tangent, arg
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
            step = _fresh(push(lambda primal: tangents.get(id(primal))), tangents.values())
            if id(out) in pairs:  # in place
                assert step is not None
                tangents[id(out)].copy_(step)
                return pairs[id(out)]
        return self.pair(out, step)

    def native(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional by PyTorch's own forward AD, or by its backward pass."""
        try:
            with differentiable(func):
                out = func(*args, **kwargs)
                self._check_not_lost(func, (args, kwargs), out)
        except NotImplementedError as error:
            out = self.by_backward(func, args, kwargs)
            if out is NotImplemented:
                raise named(error, func) from error
        return self._without_graph(out) if self.learnt else out

    def by_backward(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional by its backward pass; NotImplemented if that is impossible."""
        return NotImplemented if in_place(func, kwargs) else by_reverse(func, args, kwargs)

    def _check_not_lost(self, func: Callable[..., Any], inputs: Any, out: Any) -> None:
        """Raises if a sparse output, or an operator that may discard tangents, has lost them."""
        sparse = isinstance(out, Tensor) and out.layout is not torch.strided
        name = qualified_name(func)
        trusted = func not in DISCARD and (name is None or name.split("::")[0] in PYTORCHS)
        if trusted and not sparse:
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


def _knows(rule: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a rule takes these keywords; some functionals have several names for an argument."""
    names = keywords(rule)
    return "out" not in kwargs and (names is None or kwargs.keys() <= names)


def _fresh(tangent: Tensor | None, inputs: Iterable[Tensor]) -> Tensor | None:
    """A tangent that shares no memory with the inputs', so that it may be modified in place."""
    if tangent is None or tangent.layout is not torch.strided:
        return tangent
    place = tangent.untyped_storage().data_ptr()
    others = (t for t in inputs if t.layout is torch.strided)
    shared = any(place == t.untyped_storage().data_ptr() for t in others)
    return tangent.clone() if shared else tangent


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


def in_place(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a functional modifies one of its arguments."""
    name = getattr(func, "__name__", "")
    method = name.endswith("_") and not name.endswith("__")
    return method or name in IN_PLACE or bool(kwargs.get("inplace")) or "out" in kwargs
