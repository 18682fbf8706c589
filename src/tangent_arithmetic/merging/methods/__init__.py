"""The merging methods, one per file. All modules of this folder are imported, and so registered."""

from __future__ import annotations

from tangent_arithmetic.merging.registry import METHODS, Method
from tangent_arithmetic.runtime.errors import unknown
from tangent_arithmetic.runtime.registry import import_modules

__all__ = ["METHODS", "get_method"]

import_modules(__name__, __path__)


def get_method(name: str) -> Method:
    """The merging method with this name.

    Raises:
        UsageError: if no method has it.
    """
    if name not in METHODS:
        raise unknown("merging method", name, METHODS)
    return METHODS[name]
