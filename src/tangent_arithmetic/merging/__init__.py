"""Model merging: methods by name, streamed from files to files. See docs/merging.md.

The public names are imported at first use. The classes of the methods, such as
`TaskArithmeticAlgorithm`, follow from their registration, see `merging.algorithms`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tangent_arithmetic.merging.algorithms import Algorithm, algorithm_class
    from tangent_arithmetic.merging.language import LanguageModelPool
    from tangent_arithmetic.merging.methods import METHODS, get_method
    from tangent_arithmetic.merging.pool import CLIPVisionModelPool, ModelPool, run_pool
    from tangent_arithmetic.merging.registry import Piece, merging_method
    from tangent_arithmetic.merging.saving import save_merged, written_recipe

_HOMES = ("methods", "registry", "pool", "language", "saving", "algorithms")

__all__ = ["METHODS", "Algorithm", "CLIPVisionModelPool", "LanguageModelPool", "ModelPool", "Piece"]
__all__ += [
    "algorithm_class",
    "get_method",
    "merging_method",
    "run_pool",
    "save_merged",
    "written_recipe",
]


def __getattr__(name: str) -> Any:
    homes = _HOMES if name in __all__ else ()
    for module in (importlib.import_module(f"{__name__}.{home}") for home in homes):
        if hasattr(module, name):
            return getattr(module, name)
    if name[:1].isupper():
        algorithms = importlib.import_module(f"{__name__}.algorithms")
        if name in (method.algorithm for method in algorithms.METHODS.values()):
            return algorithms.algorithm_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
