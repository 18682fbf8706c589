"""Tangents of one value along several directions, of which only those that move it are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Alive = tuple[int, ...]  # the directions that move a value, ascending


class Stack:
    """The tangents of a value along the directions that move it; along the others they are zero.

    They are one tensor with a leading axis of directions, or separate tensors until that is needed:
    the tangents of a weight are the caller's, and stay where they are.

    Args:
        alive: the directions, ascending.
        tangents: (directions, *shape of the value), or one tensor a direction.
        shared: whether other values may have the same memory, so that it must not be modified.
    """

    __slots__ = ("_parts", "_values", "alive", "shared")

    def __init__(
        self, alive: Alive, tangents: Tensor | Sequence[Tensor], shared: bool = False
    ) -> None:
        self.alive, self.shared = alive, shared
        self._values = tangents if isinstance(tangents, Tensor) else None
        self._parts = None if isinstance(tangents, Tensor) else list(tangents)

    @property
    def values(self) -> Tensor:
        """(directions, *shape of the value)."""
        if self._values is None:
            assert self._parts is not None
            self._values, self._parts = torch.stack(self._parts), None
        return self._values

    @property
    def parts(self) -> Sequence[Tensor]:
        """The tangents, one a direction."""
        if self._parts is not None:
            return self._parts
        assert self._values is not None
        return self._values.unbind(0)

    @property
    def separate(self) -> bool:
        """Whether the tangents are separate tensors still."""
        return self._values is None

    def along(self, direction: int) -> Tensor | None:
        """The tangent along one direction; None for zero."""
        return self.parts[self.alive.index(direction)] if direction in self.alive else None

    def lifted(self, ndim: int) -> Tensor:
        """The values with axes of one after the first, to broadcast against (*, ndim axes)."""
        values = self.values
        missing = ndim + 1 - values.ndim
        return values.reshape(len(values), *[1] * missing, *values.shape[1:])

    def become(self, other: Stack) -> None:
        """Takes the tangents of another stack, after an operation in place."""
        self.alive, self._values, self._parts = other.alive, other._values, other._parts

    def places(self) -> set[int]:
        """The memory that it uses."""
        tensors = [self._values] if self._parts is None else self._parts
        return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


Stacks = Callable[[object], Stack | None]  # a primal input -> its tangents; None is zero


def mapped(function: Callable[[Tensor], Any], stack: Stack) -> Any:
    """A function of each tangent, as one operation: its outputs with a leading axis.

    Raises:
        RuntimeError: if an operation of it does not take a further axis.
    """
    with _without_loops():
        return torch.vmap(function)(stack.values)


@contextlib.contextmanager
def _without_loops() -> Iterator[None]:
    """Makes `torch.vmap` raise where it would warn of a slow loop."""
    functorch: Any = torch._C._functorch  # these three are not in its stubs
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def union(stacks: Iterable[Stack]) -> Alive:
    """The directions along which at least one of the values moves."""
    return tuple(sorted({k for stack in stacks for k in stack.alive}))


def summed(terms: Sequence[Stack], foreign: set[int]) -> Stack:
    """The sum of stacks of one shape, in memory of its own.

    Args:
        terms: at least one, of which the longest may be overwritten.
        foreign: memory that must not be overwritten.
    """
    first, *others = sorted(terms, key=lambda term: -len(term.alive))
    alive, values = union(terms), first.values
    if len(first.alive) < len(alive):
        joined = tuple(k for term in _by_place(terms) for k in term.alive)
        if joined == alive:  # disjoint, one after the other
            return Stack(alive, torch.cat([term.values for term in _by_place(terms)]))
        values = values.new_zeros(len(alive), *values.shape[1:])
        values[_positions(alive, first.alive)] = first.values
    elif first.places() & foreign or overlaps(values):
        if [other.alive for other in others] == [alive]:
            return Stack(alive, values + others[0].values)
        values = values.clone(memory_format=torch.contiguous_format)
    for other in others:
        where = _positions(alive, other.alive)
        if isinstance(where, slice):
            values[where].add_(other.values)
        else:
            values.index_add_(0, torch.tensor(where, device=values.device), other.values)
    return Stack(alive, values)


def _by_place(terms: Sequence[Stack]) -> list[Stack]:
    return sorted(terms, key=lambda term: term.alive)


def _positions(alive: Alive, part: Alive) -> slice | list[int]:
    """Where some of the directions are among all."""
    found = [alive.index(k) for k in part]
    run = found == list(range(found[0], found[0] + len(found)))
    return slice(found[0], found[0] + len(found)) if run else found


def overlaps(values: Tensor) -> bool:
    """Whether elements of a tensor may share memory, as after `expand`."""
    return any(s == 0 and n > 1 for s, n in zip(values.stride(), values.shape, strict=True))
