"""Atomic writes: a file is written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tangent_arithmetic.runtime.errors import UnwritableError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.processes import fcntl, lock

LONGEST_STEM = 200  # bytes of a file name that are used in its temporary folder's name
PART = ".tangent.part"  # ends the name of a temporary folder, after 8 random characters
BAD_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
BAD_PATH = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
UNWRITABLE = {*BAD_DISK, *BAD_PATH, errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV}


@contextlib.contextmanager
def atomic(path: Path, fsync: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` if the block succeeds.

    Readers see the old file or the complete new one, even after a power failure unless `fsync` is
    false. The next write to `path` removes partial files of killed processes. A file that is
    replaced keeps its mode, and a symbolic link its place: the file that it points to is replaced.

    Raises:
        UnwritableError: if the disk is full or the place is not writable.
    """
    with disk_errors(path), part_folder(target := _target(path)) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        if fsync:
            _sync(temporary)
        temporary.chmod(mode)
        temporary.replace(target)
    if fsync and os.name == "posix":
        with disk_errors(path):
            _sync(target.parent)


def _target(path: Path) -> Path:
    """The path itself, or where a symbolic link leads."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, and deletes it after the block.

    The folder is locked, which distinguishes it from folders of killed processes; such folders for
    the same `path` are removed first.
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
    """A new folder, and the handle of its lock where the system supports locks."""
    prefix = f".{_stem(path.name)}."
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=PART))
        if fcntl is None:
            return folder, None
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            lock(handle)
            if folder.is_dir():
                return folder, handle
            os.close(handle)  # removed by another process before it was locked


def _stem(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:LONGEST_STEM])


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of a full or read-only disk while `path` is written into `UnwritableError`."""
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
    """The reason why a file cannot be written; None if an error has another cause."""
    if isinstance(error, UnwritableError):
        return error.reason
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        code = int(match[1])
    return os.strerror(code) if code in UNWRITABLE else None


def remove_parts(folder: Path, name: str = "") -> None:
    """Removes the temporary folders of killed processes, see `part_folder`, from a folder.

    Those that a running process is writing to are locked and kept; without locks, all are kept.

    Args:
        folder: the folder.
        name: the file whose parts to remove; "" for all files.
    """
    for part in folder.glob(f".{glob.escape(_stem(name)) or '*'}.????????{PART}"):
        with contextlib.suppress(OSError):  # another process has just removed it
            handle = os.open(part, os.O_RDONLY)
            try:
                if lock(handle, wait=False):
                    shutil.rmtree(part)  # refuses what is not a folder
            finally:
                os.close(handle)


def files_below(folder: Path, suffix: str) -> Iterator[Path]:
    """The files below a folder whose names end so, while other processes write and delete there.

    Unlike `Path.rglob`, which fails at a folder that is deleted meanwhile.
    """
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if name.endswith(suffix))


def check_writable(path: Path) -> None:
    """Checks that a file can be written, before a long computation of its content.

    Raises:
        UnwritableError: if it cannot, or the path exists and is not a file.
    """
    with disk_errors(path):
        if path.exists() and not path.is_file():
            raise UnwritableError(path, "it exists and is not a file")
        with part_folder(_target(path)) as folder:
            (folder / path.name).write_bytes(bytes(4096))


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; escapes characters that UTF-8 cannot encode."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically, see `as_json`."""
    write_text(path, json.dumps(as_json(value), indent=2, allow_nan=False) + "\n")


def as_json(value: object) -> Any:
    """A value as our JSON files hold it.

    Home folders become `~`, see `private.without_home`; NaN and infinities, which JSON lacks, None.
    """
    return _finite(without_home(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
