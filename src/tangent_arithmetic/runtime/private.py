"""Hides home folders in paths that are written or shared."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# a match must not start inside a longer path (except after __pretrained__), nor end inside a name
BEFORE, AFTER = r"(?:(?<![\w.~-])|(?<=__pretrained__))", r"(?=$|[^\w.@+-]|\.(?:\s|$))"


def without_home(value: object) -> Any:
    """Replaces the home folder by `~` in strings and paths, also inside lists and mappings.

    `/home/ann` does not match in `/home/anna`, and a home folder of `/` is ignored.

    Args:
        value: JSON-like data; `Path`s become strings, other types are returned unchanged.
    """
    if isinstance(value, str | os.PathLike):
        return _shortened(os.fspath(value))
    if isinstance(value, Mapping):
        return {without_home(key): without_home(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [without_home(inner) for inner in value]
    return value


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with `~` expanded; `~user` of an unknown user is left unchanged."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises there


def _shortened(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()  # file names may be arbitrary bytes
    for home in _homes():
        text = re.sub(rf"{BEFORE}{re.escape(home)}{AFTER}", "~", text)
    return text


def _homes() -> list[str]:
    """The home folder, as named and with links resolved; the longer path first."""
    try:
        home = Path.home()
        paths = {str(path).rstrip("/\\") for path in (home, home.resolve())}
    except (RuntimeError, OSError):  # no home folder, or circular links
        return []
    homes = (home for home in paths if Path(home).is_absolute() and len(Path(home).parts) > 1)
    return sorted(homes, key=len, reverse=True)
