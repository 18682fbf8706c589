"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tangent_arithmetic.runtime.errors import UnwritableError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.processes import fcntl, lock

LONGEST_STEM = 200  # bytes of a file's name that its temporary folder has; a name has 255 at most
UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


@contextlib.contextmanager
def atomic(path: Path, fsync: bool = True) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and moves it there if the block succeeds.

    A reader sees the old file or the whole new one, never a part; after a power cut too, unless
    `fsync` is false. What a process that was killed in such a block left half written is removed
    by the next one that writes the same file.

    Raises:
        UnwritableError: if the disk is full, or nothing can be written there.
    """
    with disk_errors(path), part_folder(path) as folder:
        temporary = folder / path.name
        temporary.touch()
        yield temporary
        if fsync:
            _sync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    if fsync and os.name == "posix":
        with disk_errors(path):
            _sync(path.parent)


@contextlib.contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path`, which exists during the block.

    It is locked, so that others can tell it from one that a killed process left; those for the same
    `path` are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, path.name)
    folder, handle = _new_part(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _new_part(path: Path) -> tuple[Path, int | None]:
    """A new folder, and the handle of the lock on it where the system has locks."""
    prefix = f".{_stem(path.name)}."
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".part"))
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            lock(handle)
            if folder.is_dir():
                return folder, handle
            os.close(handle)  # taken for left behind before it was locked


def _stem(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:LONGEST_STEM])


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Makes an `UnwritableError` of what a full or read-only disk says while `path` is written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = _unwritable(error)
        if reason is None:
            raise
        raise UnwritableError(path, reason) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(error: Exception) -> str | None:
    """What keeps a file from being written, if that is what an error says."""
    if isinstance(error, UnwritableError):
        return error.reason
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    return os.strerror(code) if code in UNWRITABLE else None


def remove_parts(folder: Path, name: str = "") -> None:
    """Removes what killed processes left half written in a folder, of a file or of all.

    What a living process is writing is locked and stays; so does everything on a file system
    without locks.
    """
    for part in folder.glob(f".{glob.escape(_stem(name))}*.part"):
        with contextlib.suppress(OSError):  # another process has just removed it
            handle = os.open(part, os.O_RDONLY)
            try:
                if lock(handle, wait=False):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(handle)


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before the work whose result it is to hold.

    Raises:
        UnwritableError: if it cannot, or something else than a file is there.
    """
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise UnwritableError(path, "it exists and is no file")
        with part_folder(path) as folder:
            (folder / path.name).write_bytes(bytes(4096))


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; what UTF-8 has no bytes for is spelt out."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, without home folders, see `runtime.private.without_home`."""
    write_text(path, json.dumps(without_home(value), indent=2) + "\n")
