"""The merging methods, one per file. All modules of this folder are imported, and so registered."""

from __future__ import annotations

import importlib
import pkgutil

from tangent_arithmetic.merging.registry import METHODS, Method
from tangent_arithmetic.runtime.errors import unknown

__all__ = ["METHODS", "get_method"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def get_method(name: str) -> Method:
    """The merging method with this name.

    Raises:
        UsageError: if no method has it.
    """
    if name not in METHODS:
        raise unknown("merging method", name, METHODS)
    return METHODS[name]
