"""The registry of differentiation rules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tangent_arithmetic.tangent.stacks import Stack, Stacks, mapped

Tangent = Callable[[Any], Tensor | None]  # a primal input -> its tangent; None is zero
Push = Callable[[Tangent], Tensor | None]
Rule = TypeVar("Rule", bound=Callable[..., Any])

RULES: dict[Callable[..., Any] | str, Callable[..., Any]] = {}
COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {}
STACKED: dict[Callable[..., Any], Callable[..., Any]] = {}  # of several directions only
VIEWS: set[Callable[..., Any]] = set()  # linear in the first argument, which alone is moved


@dataclass(frozen=True)
class Pushes:
    """A push that also takes the tangents along several directions at once.

    Args:
        one: the push for one direction.
        several: the same for stacked tangents: given `d`, which maps each input to its `Stack`
            (None for zero), all along the same directions, it returns the stacked tangents of the
            value, (directions, *shape), or a tensor that broadcasts to it; None for zero.
            `NotImplemented` leaves it to one push per direction.
    """

    one: Push
    several: Callable[[Stacks], Any]

    def __call__(self, d: Tangent) -> Tensor | None:
        """The tangent along one direction."""
        return self.one(d)


def rule(*functionals: Callable[..., Any] | str) -> Callable[[Rule], Rule]:
    r"""Registers the derivative of functionals.

    A rule has the signature of its functional and is called with primal tensors. It returns the
    functional's value, computed by differentiable operations as in the ordinary model, and a
    function `push`: given `d`, which maps each input to its tangent (None for zero), `push(d)` is
    the tangent of the value, \(\sum_i \partial_i f \, d(x_i)\). `push` runs without autograd, once
    per direction that moves an input; as `Pushes`, once for all of them. For unsupported arguments
    a rule returns `NotImplemented`, which falls back to PyTorch's forward AD.
    If the value is one of the inputs, the functional is in place.

    Args:
        *functionals: the functional under its names in `torch.overrides`, such as `F.linear` or
            `torch.Tensor.mul`; an operator of a library by its qualified name, such as
            `"torchvision::roi_align"`.

    Example:
        >>> import torch
        >>> @rule(torch.sinh)
        ... def sinh(x):
        ...     return torch.sinh(x), lambda d: torch.cosh(x) * d(x)
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(functionals, function))
        return function

    return register


def composite(*functionals: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Registers a functional as a composition of others, to which their own rules apply.

    The composition has the functional's signature and is called with dual tensors. For unsupported
    arguments it returns `NotImplemented`, which falls back to PyTorch's forward AD.
    """

    def register(function: Rule) -> Rule:
        COMPOSITES.update(dict.fromkeys(functionals, function))
        return function

    return register


@functools.cache
def keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names of a rule's arguments; None if it takes arbitrary keywords."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not None; None if there are none."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def bilinear(
    product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor
) -> tuple[Tensor, Pushes]:
    """What a rule returns for a product that is linear in each of two factors."""

    def push(d: Tangent) -> Tensor | None:
        dleft, dright = d(left), d(right)
        return total(
            None if dleft is None else product(dleft, right),
            None if dright is None else product(left, dright),
        )

    def several(d: Stacks) -> Tensor | None:
        dleft, dright = d(left), d(right)
        return total(
            None if dleft is None else along_first(lambda v: product(v, right), dleft),
            None if dright is None else along_first(lambda v: product(left, v), dright),
        )

    return product(left, right), Pushes(push, several)


def along_first(function: Callable[[Tensor], Tensor], stack: Stack) -> Tensor:
    """A linear function of each of the stacked tangents, as one operation if that is possible."""
    if not stack.separate:
        try:
            result: Tensor = mapped(function, stack)
            return result
        except RuntimeError:  # an operation that has no batches, such as sparse products
            pass
    return torch.stack([function(part) for part in stack.parts])


def along(d: Stacks, direction: int) -> Tangent:
    """Each input's tangent along one of several directions."""

    def tangent(primal: Any) -> Tensor | None:
        stack = d(primal)
        return None if stack is None else stack.along(direction)

    return tangent
