"""A registry: the named choices of one kind, to which users add their own; folders of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import TypeVar

from tangent_arithmetic.runtime.errors import UsageError, unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """Choices by name, in order of registration; an unknown name raises a `UsageError`.

    Args:
        kind: what is registered, for messages.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __missing__(self, name: str) -> T:
        raise unknown(self.kind, name, self)

    def add(self, name: str, choice: T) -> T:
        """Registers and returns a choice; a taken name raises a `UsageError`."""
        if name in self:
            raise UsageError(f"{self.kind} {name!r} is already registered; choose another name")
        self[name] = choice
        return choice

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a choice under this name."""
        return lambda choice: self.add(name, choice)


def import_modules(package: str, path: Iterable[str]) -> None:
    """Imports all modules of a package, which register what they define.

    Args:
        package: its `__name__`.
        path: its `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
