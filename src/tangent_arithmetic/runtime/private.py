"""Paths as they may be shared: without the home folder of who ran a command."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# a home does not begin inside a longer path (but the file in a model's name), nor end inside a name
BEFORE, AFTER = r"(?:(?<![\w.~-])|(?<=__pretrained__))", r"(?=$|[^\w.@+-]|\.(?:\s|$))"


def without_home(value: Any) -> Any:
    """A value as it is written to results, recipes, logs and services: home folders become `~`.

    Texts, paths, and whatever lists and mappings of them hold; everything else is left as it is.
    A home folder is replaced only where its name ends, so that `/home/ann` does not touch
    `/home/anna`; the root folder is no one's home.

    Args:
        value: JSON-like data, in which paths (`Path`) become texts.
    """
    if isinstance(value, str):
        return _shortened(value)
    if isinstance(value, os.PathLike):
        return _shortened(os.fspath(value))
    if isinstance(value, Mapping):
        return {without_home(key): without_home(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [without_home(inner) for inner in value]
    return value


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder for `~`; one of an unknown user stays as it is written."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises there


def _shortened(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # a name on disk may be any bytes
    for home in _homes():
        text = re.sub(rf"{BEFORE}{re.escape(home)}{AFTER}", "~", text)
    return text


def _homes() -> list[str]:
    """The home folder, as it is named and where links in it lead; the longer one first."""
    try:
        named = Path.home()
        found = {str(home).rstrip("/\\") for home in (named, named.resolve())}
    except (RuntimeError, OSError):  # no home folder at all, or links in a circle
        return []
    homes = (home for home in found if Path(home).is_absolute() and len(Path(home).parts) > 1)
    return sorted(homes, key=len, reverse=True)
