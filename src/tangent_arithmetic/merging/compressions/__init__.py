"""The compressions, one per file. All modules of this folder are imported, and so registered."""

from __future__ import annotations

from tangent_arithmetic.merging.compressing import COMPRESSIONS
from tangent_arithmetic.runtime.registry import import_modules

__all__ = ["COMPRESSIONS"]

import_modules(__name__, __path__)
