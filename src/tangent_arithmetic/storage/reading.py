"""Reading files that others wrote: every failure becomes a `UsageError` that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tangent_arithmetic.runtime.errors import MissingFileError, RunError, UsageError, shown

LONGEST_PATH = 1000
LONGEST_JSON = 16 << 20  # bytes; parsed, they may take 25 times as much memory
LONGEST_HEADER = 1 << 20  # bytes of a safetensors header; parsed, 50 times as much memory
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def readable(path: str | Path, expected: str) -> Iterator[None]:
    """Turns any failure to read or parse a file into a `UsageError` that names it.

    Args:
        path: the file.
        expected: what it should be, with its article, for instance "a JSON object".

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it cannot be read as `expected`; our own errors pass through.
    """
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as error:  # every parser has its own exceptions
        if isinstance(error, FileNotFoundError) and not os.path.exists(path):  # noqa: PTH110
            raise MissingFileError(f"{path} does not exist, expected {expected}") from error
        refuse_pointer(path)
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UsageError(
            f"{path} cannot be read as {expected} ({type(error).__name__}: {_reason(path, error)})"
            f"{remedy}"
        ) from error


def _reason(path: str | Path, error: BaseException) -> str:
    """The error in a few words; names its file if that is another one, as inside a folder."""
    if not isinstance(error, OSError) or not error.strerror:
        return shown(error)
    if error.filename is None or str(error.filename) == str(path):
        return error.strerror
    return f"{shown(error.filename, LONGEST_PATH)}: {error.strerror}"


def refuse_pointer(path: str | Path) -> None:
    """Raises a UsageError if a file is the placeholder that Git LFS leaves until it is fetched."""
    start = b""
    with suppress(OSError, ValueError), Path(path).open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise UsageError(
            f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
        )


def read_text(path: str | Path, expected: str = "a text in UTF-8") -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it cannot be read, for instance because it is UTF-16 or a Git LFS pointer.
    """
    with readable(path, expected):
        refuse_pointer(path)
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is not a JSON object, too deeply nested, or longer than `LONGEST_JSON`.
    """
    with readable(path, "a JSON object"):
        if (size := Path(path).stat().st_size) > LONGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, expected at most {LONGEST_JSON:,}")
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
        return value


def check_header(path: str | Path) -> None:
    """Refuses a safetensors file with an oversized header, before the header is parsed.

    Raises:
        UsageError: if the header exceeds `LONGEST_HEADER` plus an eighth of the file.
        OSError: if the file cannot be read.
    """
    refuse_pointer(path)
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER + Path(path).stat().st_size // 8:
        raise UsageError(
            f"{path} is damaged: its header has {length:,} bytes, expected at most "
            f"{LONGEST_HEADER:,} plus an eighth of the file"
        )


def inside(source: str | Path, name: str) -> PurePosixPath:
    """A relative path from a list or archive that stays below any folder it is joined to.

    Args:
        source: the list or archive, for the message.
        name: the path in it.

    Raises:
        UsageError: if it is absolute or empty, or contains `..` or a null byte.
    """
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    problem = ""
    if path.is_absolute() or windows.anchor or ".." in windows.parts or not path.parts:
        problem = "leads out of its folder"
    elif "\0" in name:
        problem = "cannot be read as a path"
    if problem:
        raise UsageError(f"{source} is refused: it names {shown(name)!r}, which {problem}")
    return path
