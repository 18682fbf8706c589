"""Model merging: methods by name, streamed from files to files. See docs/merging.md.

The public names are imported at first use. The classes of the methods, such as
`TaskArithmeticAlgorithm`, are made from their registration, see `merging.algorithms`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tangent_arithmetic.merging.algorithms import Algorithm, algorithm_class
    from tangent_arithmetic.merging.methods import METHODS, get_method
    from tangent_arithmetic.merging.pool import CLIPVisionModelPool, ModelPool, run_pool
    from tangent_arithmetic.merging.registry import Piece, merging_method
    from tangent_arithmetic.merging.saving import save_merged, written_recipe

_HOME_OF = {
    "Algorithm": "algorithms", "algorithm_class": "algorithms", "METHODS": "methods",
    "get_method": "methods", "CLIPVisionModelPool": "pool", "ModelPool": "pool",
    "run_pool": "pool", "Piece": "registry", "merging_method": "registry",
    "save_merged": "saving", "written_recipe": "saving",
}  # fmt: skip

__all__ = [
    "METHODS", "Algorithm", "CLIPVisionModelPool", "ModelPool", "Piece", "algorithm_class",
    "get_method", "merging_method", "run_pool", "save_merged", "written_recipe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    if name[:1].isupper():
        algorithms = importlib.import_module(f"{__name__}.algorithms")
        if name in (method.algorithm for method in algorithms.METHODS.values()):
            return algorithms.algorithm_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
