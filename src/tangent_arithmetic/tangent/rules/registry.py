"""Where the rules are registered, and what a rule is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Tangent = Callable[[Any], Tensor | None]  # a primal input -> its tangent; None is zero
Push = Callable[[Tangent], Tensor | None]
Rule = TypeVar("Rule", bound=Callable[..., Any])

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {}


def rule(*functionals: Callable[..., Any]) -> Callable[[Rule], Rule]:
    r"""Registers the derivative of functionals.

    A rule has the signature of its functional and is called with the values of its tensors. It
    returns the functional's value, computed by differentiable operations as the ordinary model
    would, and a function `push`: given `d`, which maps each input to its tangent (None where it has
    none), `push(d)` is the tangent of the value, \(\sum_i \partial_i f \, d(x_i)\). `push` runs
    without a graph and may run once for each of several directions. A rule returns
    `NotImplemented` for a case that it leaves to PyTorch's forward AD. If the value is one of the
    inputs the functional works in place.

    Args:
        *functionals: what `torch.overrides` calls the functional: `F.linear`, `torch.Tensor.mul`.

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
    """Registers a functional as a composition of others, which then meet their own rules.

    The composition has the functional's signature, is called with pairs, and returns
    `NotImplemented` for a case that it leaves to PyTorch's forward AD.
    """

    def register(function: Rule) -> Rule:
        COMPOSITES.update(dict.fromkeys(functionals, function))
        return function

    return register


@functools.cache
def keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names of a rule's arguments; None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of what is not None; None if there is nothing."""
    known = [term for term in terms if term is not None]
    if not known:
        return None
    first, *others = known
    for term in others:
        first = first + term
    return first
