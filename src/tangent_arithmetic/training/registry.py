"""A registry of named choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tangent_arithmetic.runtime.errors import unknown

T = TypeVar("T")


class Registry(dict[str, T]):
    """The choices of one kind, by name.

    Args:
        kind: the kind, for messages.

    Raises:
        UsageError: on looking up an unknown name.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __missing__(self, name: str) -> T:
        raise unknown(self.kind, name, self)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds a choice under this name."""

        def add(choice: T) -> T:
            self[name] = choice
            return choice

        return add
