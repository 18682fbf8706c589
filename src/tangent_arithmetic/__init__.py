"""Tangent Arithmetic: task vectors, linearised fine-tuning and the evaluation of both.

The public names below are imported at first use, so that importing the package is free.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tangent_arithmetic.arithmetic.task_vectors import (
        LinearizedTaskVector,
        NonLinearTaskVector,
        TaskVector,
        linear_to_nonlinear,
        nonlinear_to_linear,
        weights_of,
    )
    from tangent_arithmetic.data.suites import register_dataset
    from tangent_arithmetic.encoders.classifiers import ImageClassifier, MultiHeadImageClassifier
    from tangent_arithmetic.encoders.images import ClassificationHead, ImageEncoder
    from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
    from tangent_arithmetic.run.frames import load_results
    from tangent_arithmetic.tangent import Displacement, jvp, jvps, rule
    from tangent_arithmetic.tangent.linearized import LinearizedModel, linearize

__version__ = "0.1.0"

# the modules of the public names, light ones first; the last ones import open_clip
_HOMES = (
    "data.suites",
    "run.frames",
    "tangent",
    "tangent.linearized",
    "arithmetic.task_vectors",
    "encoders.images",
    "encoders.linearized",
    "encoders.classifiers",
)

__all__ = [
    "ClassificationHead",
    "Displacement",
    "ImageClassifier",
    "ImageEncoder",
    "LinearizedImageEncoder",
    "LinearizedModel",
    "LinearizedTaskVector",
    "MultiHeadImageClassifier",
    "NonLinearTaskVector",
    "TaskVector",
    "__version__",
    "jvp",
    "jvps",
    "linear_to_nonlinear",
    "linearize",
    "load_results",
    "nonlinear_to_linear",
    "register_dataset",
    "rule",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _on_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ends a command interrupted by Ctrl-C while it imports as `errors.entry_point` does later."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)


def _is_command(argv: list[str]) -> bool:
    """Whether the running program is one of this project's commands, not a user's own."""
    program = Path(*argv[:1]).resolve()
    root = Path(__file__).resolve().parents[2]
    return (
        argv[:1] == ["-m"]
        or program.parent in (root / "src", root / "scripts")
        or program.stem == "tangent-arithmetic"
    )


if _is_command(sys.argv):
    sys.excepthook = _on_interrupt
