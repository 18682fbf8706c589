"""Dual numbers with the tangents along several directions, at the price of their arithmetic.

A value has tangents only along the directions that move it (`stacks.py`): a direction that moves
one block costs nothing before it, and after it no product with a tangent of a weight. Where an
operation has a rule for stacks, the tangents go through it together. Any other is evaluated once
per direction. An operation in place on memory that several values share needs a pass per direction.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.backends import differentiable
from tangent_arithmetic.tangent.duals import Duals, in_place
from tangent_arithmetic.tangent.outputs import differentiable_tensors
from tangent_arithmetic.tangent.plain import operation
from tangent_arithmetic.tangent.replay import random_states, set_random_states
from tangent_arithmetic.tangent.rules import STACKED, VIEWS, Pushes, along
from tangent_arithmetic.tangent.stacks import Alive, Stack, mapped, overlaps, summed, union
from tangent_arithmetic.tangent.state import unpack

STACK = "_stack_of_tangents"  # attribute of a dual tensor; PyTorch's own tangent is a placeholder


ONE_BY_ONE: WeakSet[nn.Module] = WeakSet()  # modules whose directions each need a pass
AT_ONCE: ContextVar[int | None] = ContextVar("at_once", default=None)
FACTS = {"__get__", "__len__", "dim", "element_size", "is_complex", "is_contiguous"}
FACTS |= {"is_floating_point", "ndimension", "numel", "size", "storage_offset", "stride", "type"}


@contextlib.contextmanager
def at_once(count: int | None) -> Iterator[None]:
    """Takes at most `count` directions in one pass inside the block; None for all of them.

    Memory grows with the number of directions in a pass; each further pass computes the module's
    values once more.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count is not None and count < 1:
        raise ValueError(f"expected a positive number of directions at once, got {count}")
    token = AT_ONCE.set(count)
    try:
        yield
    finally:
        AT_ONCE.reset(token)


class CannotShare(Exception):
    """This module cannot propagate several tangents in one pass."""


class Directions(Duals):
    """Applies the rules along several directions; never learnt.

    Args:
        count: the number of directions.
    """

    def __init__(self, count: int) -> None:
        super().__init__(learnt=False)
        self.count = count

    def weight(self, value: Tensor, tangents: Sequence[Tensor | None]) -> Tensor:
        """The dual tensor of a parameter; None is a zero tangent."""
        moving = [(k, t.to(value.dtype)) for k, t in enumerate(tangents) if t is not None]
        if not moving:
            return value
        alive, parts = zip(*moving, strict=True)
        return self._pair(value, Stack(alive, parts, shared=True))

    def tangents(self, value: object) -> tuple[Any, list[Tensor] | None]:
        """The value and its tangent along each direction; None for no tangents."""
        primal, stack = self._split(value)
        if stack is None:
            return primal, None
        steps = [stack.along(k) for k in range(self.count)]
        return primal, [torch.zeros_like(primal) if t is None else t for t in steps]

    def _pair(self, primal: Tensor, stack: Stack | None) -> Tensor:
        if stack is None:
            return primal
        if overlaps(primal):  # which PyTorch's dual tensors must not; nothing writes to them
            primal, stack.shared = primal.contiguous(), True
        dual: Tensor = forward_ad.make_dual(primal, torch.zeros_like(primal))
        setattr(dual, STACK, stack)
        return dual

    def _split(self, value: object) -> tuple[Any, Stack | None]:
        if not isinstance(value, Tensor):
            return value, None
        primal, tangent = unpack(value)
        if tangent is None:
            return value, None
        stack = getattr(value, STACK, None)
        if stack is None:
            raise CannotShare("an operation without a rule keeps only one tangent")
        return primal, stack

    def apply(
        self,
        rule: Callable[..., Any],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Evaluates a functional by its rule."""
        stacks: dict[int, Stack] = {}
        pairs: dict[int, Tensor] = {}  # primal -> its dual tensor

        def value_of(arg: Any) -> Any:
            primal, stack = self._split(arg)
            if stack is not None:
                stacks[id(primal)], pairs[id(primal)] = stack, arg
            return primal

        def values_of(arg: Any) -> Any:  # not recursive: the cycle would keep all tensors alive
            listed = isinstance(arg, list | tuple) and func in STACKED
            return [value_of(element) for element in arg] if listed else value_of(arg)

        values = tuple(values_of(arg) for arg in args)
        named = {name: values_of(arg) for name, arg in kwargs.items()}
        if not stacks:
            return func(*args, **kwargs)
        if any(dual.is_complex() for dual in pairs.values()):
            return self._one_by_one(func, args, kwargs)
        result = rule(*values, **named)
        if result is NotImplemented:
            return self._one_by_one(func, args, kwargs)
        out, push = result
        if func in STACKED:
            push = Pushes(_never, push)
        with torch.no_grad():
            step = self._push(push, stacks, out)
        if id(out) in pairs:
            return _replaced(pairs[id(out)], step)
        if step is not None:
            inputs = [v for v in pytree.tree_leaves((values, named)) if id(v) in stacks]
            _note_shared([(v, stacks[id(v)]) for v in inputs], out, step)
        if in_place(func, kwargs) or any(out is value for value in values):
            raise CannotShare(f"{operation(func)} modifies a tensor without tangents")
        return self._pair(out, step)

    def _push(
        self, push: Callable[..., Any], stacks: dict[int, Stack], out: Tensor
    ) -> Stack | None:
        """The tangents of a value, in memory of their own.

        Inputs that move along the same directions are one term of the sum over all inputs.
        """
        foreign = {place for stack in stacks.values() for place in stack.places()}
        terms: list[Stack] = []
        if isinstance(push, Pushes):
            for alive in dict.fromkeys(stack.alive for stack in stacks.values()):
                term = {key: s for key, s in stacks.items() if s.alive == alive}
                found = push.several(functools.partial(_stack_of, term))
                if found is NotImplemented:
                    return self._push(push.one, stacks, out)
                if found is not None:
                    values = found.to(out.dtype).expand(len(alive), *out.shape)
                    terms.append(Stack(alive, values))
            return summed(terms, foreign) if terms else None
        tangents: list[Tensor] = []
        moving: list[int] = []
        for k in union(stacks.values()):
            step = push(along(lambda primal: stacks.get(id(primal)), k))
            if step is not None:
                moving.append(k)
                tangents.append(step.to(out.dtype))
        return _restacked(tuple(moving), tangents)

    def native(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional as linear if it is known to be, else by PyTorch's forward AD."""
        if func in STACKED and "out" not in kwargs:
            return self.apply(STACKED[func], func, args, kwargs)
        if func in VIEWS and args:
            out = self._view(func, args, kwargs)
            if out is not NotImplemented:
                return out
        if getattr(func, "__name__", "") in FACTS:
            values = [self._split(arg)[0] for arg in args]
            out = func(*values, **kwargs)
            if not isinstance(out, Tensor):
                return out
        return self._one_by_one(func, args, kwargs)

    def _view(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """A linear functional of the first argument, applied to all of its tangents at once."""
        primal, stack = self._split(args[0])
        others = pytree.tree_leaves((args[1:], kwargs))
        if stack is None or any(self._split(value)[1] is not None for value in others):
            return NotImplemented
        out = func(primal, *args[1:], **kwargs)
        leaves, spec = pytree.tree_flatten(out)
        if not all(isinstance(v, Tensor) and v.dtype == primal.dtype for v in leaves):
            return NotImplemented
        stacks = _mapped(lambda t: func(t, *args[1:], **kwargs), stack)
        if stacks is None:
            return NotImplemented
        for value, found in zip(leaves, stacks, strict=True):
            _note_shared([(primal, stack)], value, found)
        return pytree.tree_unflatten(
            [self._pair(v, s) for v, s in zip(leaves, stacks, strict=True)], spec
        )

    def _one_by_one(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Evaluates a functional once per direction, with identical random numbers."""
        inputs, spec = pytree.tree_flatten((args, kwargs))
        parts = [self._split(value) for value in inputs]
        moved = [(primal, stack) for primal, stack in parts if stack is not None]
        with differentiable(func):
            if not moved:
                return func(*args, **kwargs)
            if in_place(func, kwargs) or _keeps_statistics(func, args, kwargs):
                raise CannotShare(f"{operation(func)} modifies a tensor in place")
            states = random_states()
            results: dict[int, list[Any]] = {}
            for k in union(stack for _, stack in moved):
                given = [_dual(primal, stack, k) for primal, stack in parts]
                new_args, new_kwargs = pytree.tree_unflatten(given, spec)
                set_random_states(states)
                try:
                    out = func(*new_args, **new_kwargs)
                    self._check_not_lost(func, given, out)
                except NotImplementedError as error:
                    reason = f"{operation(func)} has no forward-mode derivative"
                    raise CannotShare(reason) from error
                leaves, form = pytree.tree_flatten(out)
                if not any(True for _ in differentiable_tensors(leaves)):
                    return out
                results[k] = leaves
        return pytree.tree_unflatten(list(self._columns(results, moved)), form)

    def _columns(
        self, results: Mapping[int, list[Any]], moved: Sequence[tuple[Tensor, Stack]]
    ) -> Iterable[Any]:
        """The dual outputs of a functional from those along each direction."""
        for column in zip(*results.values(), strict=True):
            if not isinstance(column[0], Tensor):
                yield column[0]
                continue
            pairs = [unpack(value) for value in column]
            found = [(k, t) for k, (_, t) in zip(results, pairs, strict=True) if t is not None]
            stack = _restacked(tuple(k for k, _ in found), [t for _, t in found])
            if stack is not None:
                _note_shared(moved, pairs[0][0], stack)
            yield self._pair(pairs[0][0], stack)


def _never(d: Any) -> Tensor | None:
    raise AssertionError("a rule for stacks has no push for one direction")


def _dual(primal: Any, stack: Stack | None, direction: int) -> Any:
    tangent = None if stack is None else stack.along(direction)
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


def _restacked(alive: Alive, tangents: Sequence[Tensor]) -> Stack | None:
    if any(t.layout is not torch.strided for t in tangents):
        raise CannotShare("a tangent is sparse")
    return Stack(alive, torch.stack([t.detach() for t in tangents])) if tangents else None


def _replaced(dual: Tensor, step: Stack | None) -> Tensor:
    """The dual tensor after an operation in place, with new tangents."""
    stack: Stack = getattr(dual, STACK)
    if stack.shared or step is None:
        raise CannotShare("an operation in place changes memory that other values share")
    stack.become(step)
    return dual


def _mapped(function: Callable[[Tensor], Any], stack: Stack) -> list[Stack] | None:
    """The stacks of the outputs of a linear function; None if it cannot be mapped."""
    try:
        if stack.separate:
            columns = zip(*(pytree.tree_leaves(function(t)) for t in stack.parts), strict=True)
            return [Stack(stack.alive, list(column)) for column in columns]
        leaves = pytree.tree_leaves(mapped(function, stack))
    except (RuntimeError, ValueError, IndexError):  # such as views that are none of a stack
        return None
    return [Stack(stack.alive, values) for values in leaves]


def _note_shared(moved: Sequence[tuple[Tensor, Stack]], value: Tensor, result: Stack) -> None:
    """Marks tangents as shared if the result, or its value, has the memory of an input."""
    place, places = value.untyped_storage().data_ptr(), result.places()
    for primal, stack in moved:
        if place == primal.untyped_storage().data_ptr() or places & stack.places():
            stack.shared = result.shared = True


def _keeps_statistics(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a functional is a normalisation that may update running statistics."""
    if func not in (F.batch_norm, F.instance_norm):
        return False
    return (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None


def _stack_of(stacks: dict[int, Stack], primal: Tensor) -> Stack | None:
    """The tangents of a value, by its identity; None for zero."""
    return stacks.get(id(primal))
