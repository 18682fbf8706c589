"""Callables that users name as `MODULE:NAME`, such as the factory of a model or of a data set."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tangent_arithmetic.runtime.errors import UsageError, closest, shown

SPELLING = "MODULE:FACTORY, such as mypackage.models:build"


def imported(name: str) -> Callable[..., Any]:
    """The callable of this name; its module is imported, from the working directory too.

    Args:
        name: `package.module:factory`.

    Raises:
        UsageError: if the name is malformed, there is no such module or callable, or the module
            cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise UsageError(f"expected {SPELLING}, got {shown(name)!r}")
    if (here := os.getcwd()) not in sys.path:  # noqa: PTH109 - a string, as in sys.path
        sys.path.insert(0, here)
    value: Any = _module(module_name)
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [each for each in vars(value) if not each.startswith("_")]
            near = ", ".join(closest(part, names)[:5]) or "nothing"
            raise UsageError(f"{module_name} has no {attribute!r}; nearest in it: {near}")
        value = getattr(value, part)
    if not callable(value):
        raise UsageError(f"{name} is a {type(value).__name__}, expected a function or a class")
    factory: Callable[..., Any] = value
    return factory


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no module {name} on Python's path; run in the folder that contains "
                f"{name.partition('.')[0]}, or add that folder to PYTHONPATH"
            ) from error
        raise UsageError(f"{name} cannot be imported: it needs {error.name}") from error
    except Exception as error:  # the user's code may raise anything
        reason = shown(f"{type(error).__name__}: {error}", 300)
        raise UsageError(f"{name} cannot be imported ({reason})") from error
