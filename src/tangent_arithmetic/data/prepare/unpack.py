"""Archives unpacked without leaving their folder, in memory that does not depend on what they say.

An archive is read from its first byte to its last, so that its checksums are compared: a member of
a zip archive has one, so does all of a gzip, xz or bzip2 stream. Headers of tar archives are read
here rather than by `tarfile`, which takes names and records of any length into memory.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tangent_arithmetic.runtime.atomic import atomic, disk_errors
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.reading import inside, refuse_pointer
from tangent_arithmetic.storage.zips import open_zip

SPARE = 1 << 26  # bytes that any archive may unpack to
MOST_TIMES_LARGER = 100  # what it may unpack to beyond that, times its own size
BLOCK = 512  # bytes of a header of tar, and of what all content is filled up to
PLACE = 4096  # bytes that a file takes on a disk at least
LONGEST_NAME = 16 << 10  # bytes of the long name, or the records, of one member
LONGEST_DIRECTORY = 16 << 20  # bytes of that of a zip archive: 4 times the longest published one
XZ_MEMORY = 128 << 20  # bytes; `xz -9` asks for 65 MiB
CHUNK = 1 << 20
IMPOSSIBLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}  # names on a disk
NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)


class Content(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """Reads so many bytes, fewer at the end."""


Member = tuple[str, int, Content]  # name, size in bytes, content


def unpack(
    archive: Path,
    target: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    stream: Content | None = None,
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
        UnwritableError: if the disk is full, or `target` is not to be written to.
    """
    if archive.suffix.lower() == ".rar":
        raise UsageError(
            f"{archive} cannot be unpacked by Python; unpack it yourself, for instance with unar, "
            "7z x or bsdtar -xf, and put the folder beside it"
        )
    with reading(archive):
        space = shutil.disk_usage(target).free
        members = _zip(archive) if archive.suffix.lower() == ".zip" else tar(archive, stream)
        for name, size, content in progress(members, f"unpacking {archive.name}"):
            below = inside(archive, name)
            if not wanted(str(below)):
                continue
            space -= max(size, PLACE)
            if space < 0:
                raise _too_large(archive)
            _write(archive, target / below, content, name)


def gunzip(archive: Path, target: Path) -> None:
    """Unpacks one file packed by gzip.

    Raises:
        UsageError: if it is damaged, or absurdly large when unpacked.
        UnwritableError: if the disk is full, or `target` is not to be written to.
    """
    with (
        reading(archive),
        atomic(target) as temporary,
        temporary.open("wb") as file,
        gzip.open(archive) as content,
    ):
        room = _most(archive)
        while part := content.read(CHUNK):
            room -= len(part)
            if room < 0:
                raise _too_large(archive)
            file.write(part)


@contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Turns what the readers of archives say of a damaged one into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except DAMAGED as error:
        refuse_pointer(archive)
        raise UsageError(
            f"{archive} is damaged or cut short ({type(error).__name__}: {shown(error)}); delete "
            "it and run again to fetch it anew"
        ) from error


def refused(archive: Path, name: str, reason: str) -> UsageError:
    """The error for a member that is not unpacked."""
    return UsageError(
        f"{archive} is refused: its member {shown(name)!r} {reason}. The published archive has no "
        "such member; delete this one and fetch it from the official page."
    )


def _most(archive: Path) -> int:
    """Bytes that an archive may unpack to."""
    return SPARE + MOST_TIMES_LARGER * archive.stat().st_size


def _too_large(archive: Path) -> UsageError:
    return UsageError(
        f"{archive} unpacks to more than this disk or any data set has room for; delete it if you "
        "do not know where it is from, or make room"
    )


def _write(archive: Path, path: Path, content: Content, name: str) -> None:
    """Writes a member to its place."""
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            if error.errno not in IMPOSSIBLE:
                raise
            raise refused(archive, name, f"cannot be written ({error.strerror})") from error
        with file:
            while part := content.read(CHUNK):
                file.write(part)


def _zip(archive: Path) -> Iterator[Member]:
    room = _most(archive)
    with open_zip(archive, LONGEST_DIRECTORY) as file:
        for member in file.infolist():
            name = member.filename
            if member.is_dir():
                _check_folder(archive, name)
                continue
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise refused(archive, name, "is a link or a device")
            if member.flag_bits & 1:
                raise refused(archive, name, "is encrypted")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise refused(archive, name, "is packed in another way than by deflate")
            room -= PLACE + member.file_size
            if room < 0:
                raise _too_large(archive)
            with file.open(member) as content:
                yield name, member.file_size, content


def _check_folder(archive: Path, name: str) -> None:
    """Refuses a folder that is elsewhere; folders are made with their files, `./` is ours."""
    if name.strip("./"):
        inside(archive, name)


def tar(archive: Path, stream: Content | None = None) -> Iterator[Member]:
    """The files of a tar archive, one after the other; what is not read of one is passed over.

    Args:
        archive: the file, packed by gzip, xz, bzip2 or not at all.
        stream: reads the archive from here, not packed; `archive` is then its name for messages.

    Raises:
        UsageError: for a link or a device, a long header, or absurdly much content.
        tarfile.TarError: if it is damaged. What the decompressors say passes through.
    """
    if stream is not None:
        yield from _members(_Source(archive, stream, None))
        return
    with archive.open("rb") as file, _unpacked(file) as content:
        yield from _members(_Source(archive, content, None if content is file else _most(archive)))


@contextmanager
def _unpacked(file: io.BufferedReader) -> Iterator[io.BufferedIOBase]:
    """The content of a file that may be packed."""
    start = file.peek(6)
    if start.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=file) as content:
            yield content
    elif start.startswith(b"BZh"):
        with bz2.BZ2File(file) as unpacked:
            yield unpacked
    elif start.startswith((b"\xfd7zXZ\0", b"]\0\0")):
        yield io.BufferedReader(_Xz(file))
    else:
        yield file


class _Xz(io.RawIOBase):
    """Unpacks xz in bounded memory, which `lzma.open` does not; the file says how much it needs."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self._unpack = file, lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpack.eof:
            packed = self._file.read(CHUNK) if self._unpack.needs_input else b""
            if self._unpack.needs_input and not packed:
                raise EOFError("the xz stream has no end")
            if part := self._unpack.decompress(packed, len(buffer)):
                buffer[: len(part)] = part
                return len(part)
        return 0


class _Source:
    """The content of a tar archive, read from its first byte to its last.

    Args:
        archive: for messages.
        file: reads it.
        room: bytes that it may have, with `PLACE` for each header; None for any number.
    """

    def __init__(self, archive: Path, file: Content, room: int | None) -> None:
        self.archive, self._file, self._room = archive, file, room

    def read(self, size: int) -> bytes:
        """Reads so many bytes, fewer at the end."""
        self._charge(size)
        return self._file.read(size)

    def exactly(self, size: int) -> bytes:
        """Reads so many bytes.

        Raises:
            EOFError: if there are fewer.
        """
        found = self.read(size)
        if len(found) < size:
            raise EOFError(f"it ends {size - len(found)} bytes early")
        return found

    def header(self) -> tarfile.TarInfo | None:
        """The next header, None at the end of the archive, whose rest has then been read."""
        self._charge(PLACE)
        block = self.exactly(BLOCK)
        if block.count(0) < BLOCK:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        while self.read(CHUNK):  # checksums come last
            pass
        return None

    def _charge(self, size: int) -> None:
        if self._room is not None:
            self._room -= size
            if self._room < 0:
                raise _too_large(self.archive)


class _Part:
    """The content of one member.

    Args:
        source: reads the archive.
        size: bytes of it.
    """

    def __init__(self, source: _Source, size: int) -> None:
        self._source, self._left, self._filling = source, size, -size % BLOCK

    def read(self, size: int, /) -> bytes:
        """Reads so many bytes, fewer at the end."""
        found = self._source.exactly(min(size, self._left))
        self._left -= len(found)
        return found

    def skip(self) -> None:
        """Passes over what has not been read."""
        while self.read(CHUNK):
            pass
        self._source.exactly(self._filling)


def _members(source: _Source) -> Iterator[Member]:
    archive = source.archive
    long_name: str | None = None  # of the member that comes next, which has headers of its own
    records: dict[str, bytes] = {}
    while (header := source.header()) is not None:
        kind, name = header.type, long_name or header.name
        size = int(records.get("size", header.size))
        if size < 0:
            raise tarfile.HeaderError(f"a member of {size} bytes")
        part = _Part(source, size)
        if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, *NAMES):
            if size > LONGEST_NAME:
                raise refused(archive, name, f"has a header of {size:,} bytes")
            content = part.read(size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                long_name = _text(content.partition(b"\0")[0])
            elif kind == tarfile.XHDTYPE:
                records = _records(content)
                long_name = _text(records["path"]) if "path" in records else long_name
            part.skip()
            continue
        if kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in records):
            raise refused(archive, name, "is a sparse file")
        if kind == tarfile.DIRTYPE:
            _check_folder(archive, name)
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield name, size, part
        else:
            raise refused(archive, name, "is a link or a device")
        part.skip()
        long_name, records = None, {}


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _records(content: bytes) -> dict[str, bytes]:
    """The records of a pax header, `LENGTH KEY=VALUE` and a line break each."""
    found, start = {}, 0
    while start < len(content):
        digits = content[start : start + 8].partition(b" ")[0]
        end = start + (int(digits) if digits.isdigit() else 0)
        key, equals, value = content[start + len(digits) + 1 : end].partition(b"=")
        if not start < end <= len(content) or not equals or not value.endswith(b"\n"):
            raise tarfile.HeaderError("a record of a pax header has another length")
        found[_text(key)] = value[:-1]
        start = end
    return found
