"""The compressions, one per file. All modules of this folder are imported, and so registered."""

from __future__ import annotations

import importlib
import pkgutil

from tangent_arithmetic.merging.compressing import COMPRESSIONS, Compression
from tangent_arithmetic.runtime.errors import unknown

__all__ = ["COMPRESSIONS", "get_compression"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def get_compression(name: str) -> Compression:
    """The compression with this name.

    Raises:
        UsageError: if no compression has it.
    """
    if name not in COMPRESSIONS:
        raise unknown("compression", name, COMPRESSIONS)
    return COMPRESSIONS[name]
