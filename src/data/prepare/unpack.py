"""Archives unpacked without leaving their folder."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from src.checkpoints import atomic
from src.errors import UsageError
from src.logs import progress

SPARE = 1 << 30  # bytes that any archive may unpack to
MOST_TIMES_LARGER = 100  # what it may unpack to beyond that, times its own size
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
)

Member = tuple[str, int, IO[bytes]]  # name, size in bytes, content


def unpack(
    archive: Path,
    target: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    stream: IO[bytes] | None = None,
) -> None:
    """Unpacks the files of a tar or zip archive; links and anything else are refused.

    Args:
        archive: the file; its suffix .zip means zip, anything else tar, packed or not.
        target: folder to unpack to.
        wanted: whether to unpack the file of this name.
        stream: reads a tar archive from here; `archive` is then its name for messages.

    Raises:
        UsageError: if a name leads out of `target`, if a member is a link or a device, if there is
            absurdly much to unpack, or if the archive is damaged or of another format.
    """
    if archive.suffix.lower() == ".rar":
        raise UsageError(
            f"{archive} cannot be unpacked by Python; unpack it yourself, for instance with unar, "
            "7z x or bsdtar -xf, and put the folder beside it"
        )
    members = _zip(archive) if archive.suffix.lower() == ".zip" else _tar(archive, stream)
    room = shutil.disk_usage(target).free
    if stream is None:
        room = min(room, SPARE + MOST_TIMES_LARGER * archive.stat().st_size)
    with reading(archive):
        for name, size, content in progress(members, f"unpacking {archive.name}"):
            below = inside(archive, name)
            path = target / below
            if not wanted(str(below)):
                continue
            room -= size
            if room < 0:
                raise UsageError(
                    f"{archive} unpacks to more than this disk or any data set has room for; "
                    "delete it if you do not know where it is from, or make room"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)


def gunzip(archive: Path, target: Path) -> None:
    """Unpacks one file packed by gzip.

    Raises:
        UsageError: if it is damaged.
    """
    with (
        reading(archive),
        atomic(target) as temporary,
        gzip.open(archive) as content,
        temporary.open("wb") as file,
    ):
        shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Turns what the readers of archives say of a damaged one into a `UsageError`."""
    try:
        yield
    except DAMAGED as error:
        raise UsageError(
            f"{archive} is damaged or cut short ({error}); delete it and run again to fetch it anew"
        ) from error


def inside(archive: Path, name: str) -> PurePosixPath:
    """Returns the name of a member as a path below any folder.

    Raises:
        UsageError: if it is absolute or has a step up.
    """
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    if path.is_absolute() or windows.anchor or ".." in windows.parts or not path.parts:
        raise refused(archive, name, "leads out of the folder")
    return path


def refused(archive: Path, name: str, reason: str) -> UsageError:
    """The error for a member that is not unpacked."""
    return UsageError(
        f"{archive} is refused: its member {name!r} {reason}. The published archive has no such "
        "member; delete this one and fetch it from the official page."
    )


def _zip(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            if member.is_dir():
                inside(archive, member.filename)
                continue
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise refused(archive, member.filename, "is a link or a device")
            if member.flag_bits & 1:
                raise refused(archive, member.filename, "is encrypted")
            with file.open(member) as content:
                yield member.filename, member.file_size, content


def _tar(archive: Path, stream: IO[bytes] | None) -> Iterator[Member]:
    with tarfile.open(archive, "r|*", fileobj=stream) as file:
        for member in file:
            if member.isdir():
                inside(archive, member.name)
                continue
            content = file.extractfile(member) if member.isreg() else None
            if content is None:
                raise refused(archive, member.name, "is a link or a device")
            yield member.name, member.size, content
