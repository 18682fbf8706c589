"""Unpacks archives safely: below the target folder, and in bounded memory.

Archives are read from the first byte to the last, so that all checksums are verified: those of zip
members, and those at the end of gzip, xz and bzip2 streams. Tar headers are parsed here, since
`tarfile` reads names and records of any length into memory.
"""

from __future__ import annotations

import bz2
import contextlib
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
from pathlib import Path
from typing import Any, Protocol

from tangent_arithmetic.runtime.atomic import atomic, disk_errors
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.reading import inside, refuse_pointer
from tangent_arithmetic.storage.zips import open_zip

SPARE = 1 << 26  # bytes that any archive may unpack to
MOST_TIMES_LARGER = 100  # unpacked size beyond that, relative to the archive
BLOCK = 512  # bytes of a tar block
PLACE = 4096  # bytes that a file takes on disk at least
LONGEST_NAME = 16 << 10  # bytes of the long name, or the records, of one member
LONGEST_DIRECTORY = 24 << 20  # bytes of a zip directory; Tiny ImageNet's: 15 MB by our estimate
XZ_MEMORY = 128 << 20  # bytes; `xz -9` needs 65 MiB
CHUNK = 1 << 20
IMPOSSIBLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}  # invalid names
NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
FORMATS = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, struct.error)
DAMAGED = (*FORMATS, EOFError, OSError, ValueError, LookupError, OverflowError, RuntimeError)


class Content(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Reads `size` bytes, or fewer at the end."""


Member = tuple[str, int, Content]  # name, size in bytes, content


def unpack(
    archive: Path,
    target: Path,
    wanted: Callable[[str], bool] = lambda name: True,
    stream: Content | None = None,
) -> None:
    """Unpacks the files of a tar or zip archive; refuses links and devices.

    Args:
        archive: the file; the suffix .zip means zip, any other one tar, compressed or not.
        target: folder to unpack to.
        wanted: selects files by name.
        stream: a tar archive to read instead; `archive` is then its name in messages.

    Raises:
        UsageError: if a name leads out of `target`, a member is a link or a device, the content is
            absurdly large, or the archive is damaged or has another format.
        UnwritableError: if the disk is full, or `target` is not writable.
    """
    if archive.suffix.lower() == ".rar":
        raise UsageError(
            f"{archive} cannot be unpacked by Python; unpack it manually, for instance with unar, "
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
    """Unpacks one gzip file.

    Raises:
        UsageError: if it is damaged, or its content absurdly large.
        UnwritableError: if the disk is full, or `target` is not writable.
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


@contextlib.contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Turns the errors of archive readers into a `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except DAMAGED as error:
        refuse_pointer(archive)
        raise UsageError(
            f"{archive} is damaged or truncated ({type(error).__name__}: {shown(error)}); delete "
            "it and run again to download it"
        ) from error


def refused(archive: Path, name: str, reason: str) -> UsageError:
    """The error for an archive with an invalid member."""
    return UsageError(
        f"{archive} is refused: its member {shown(name)!r} {reason}. The published archive has no "
        "such member; delete this one and download it from the official page."
    )


def _most(archive: Path) -> int:
    """The maximum unpacked size of an archive in bytes."""
    return SPARE + MOST_TIMES_LARGER * archive.stat().st_size


def _too_large(archive: Path) -> UsageError:
    return UsageError(
        f"{archive} unpacks to more than fits on this disk or into any data set; delete it if you "
        "do not trust its source, or free disk space"
    )


def _write(archive: Path, path: Path, content: Content, name: str) -> None:
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
                raise refused(archive, name, "is compressed, but not by deflate")
            room -= PLACE + member.file_size
            if room < 0:
                raise _too_large(archive)
            with file.open(member) as content:
                yield name, member.file_size, content


def _check_folder(archive: Path, name: str) -> None:
    """Refuses a folder outside the target; `./` is allowed."""
    if name.strip("./"):
        inside(archive, name)


def tar(archive: Path, stream: Content | None = None) -> Iterator[Member]:
    """Iterates over the files of a tar archive; unread content is skipped.

    Args:
        archive: the file, uncompressed or compressed by gzip, xz or bzip2.
        stream: an uncompressed archive to read instead; `archive` is then its name in messages.

    Raises:
        UsageError: for a link or a device, a long header, or absurdly large content.
        tarfile.TarError: if it is damaged. Errors of the decompressors pass through.
    """
    if stream is not None:
        yield from _members(_Source(archive, stream, None))
        return
    with archive.open("rb") as file, _unpacked(file) as content:
        yield from _members(_Source(archive, content, None if content is file else _most(archive)))


def _unpacked(file: io.BufferedReader) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    """The content of a file, decompressed if necessary."""
    start = file.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if start.startswith((b"\xfd7zXZ\0", b"]\0\0")):
        return io.BufferedReader(_Xz(file))
    return contextlib.nullcontext(file)


class _Xz(io.RawIOBase):
    """Decompresses xz in bounded memory; for `lzma.open`, the file sets the memory used."""

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
    """The content of a tar archive, read sequentially.

    At most `room` bytes are read, counting `PLACE` for each header; None means no limit.
    """

    def __init__(self, archive: Path, file: Content, room: int | None) -> None:
        self.archive, self._file, self._room = archive, file, room

    def read(self, size: int) -> bytes:
        """Reads `size` bytes, or fewer at the end."""
        self._charge(size)
        return self._file.read(size)

    def exactly(self, size: int) -> bytes:
        """Reads `size` bytes; raises `EOFError` if there are fewer."""
        content = self.read(size)
        if len(content) < size:
            raise EOFError(f"it ends {size - len(content)} bytes early")
        return content

    def header(self) -> tarfile.TarInfo | None:
        """Reads the next header; at the end of the archive, reads its rest and returns None."""
        self._charge(PLACE)
        block = self.exactly(BLOCK)
        if block.count(0) < BLOCK:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        while self.read(CHUNK):  # a checksum is at the very end
            pass
        return None

    def _charge(self, size: int) -> None:
        if self._room is not None:
            self._room -= size
            if self._room < 0:
                raise _too_large(self.archive)


class _Part:
    """The content of one member, `size` bytes."""

    def __init__(self, source: _Source, size: int) -> None:
        self._source, self._left, self._padding = source, size, -size % BLOCK

    def read(self, size: int, /) -> bytes:
        """Reads `size` bytes, or fewer at the end."""
        content = self._source.exactly(min(size, self._left))
        self._left -= len(content)
        return content

    def skip(self) -> None:
        """Skips the unread content and the padding."""
        while self.read(CHUNK):
            pass
        self._source.exactly(self._padding)


def _members(source: _Source) -> Iterator[Member]:
    archive = source.archive
    long_name: str | None = None  # of the next member, from a header of its own
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
    """Parses the records of a pax header: lines of `LENGTH KEY=VALUE`."""
    records, start = {}, 0
    while start < len(content):
        digits = content[start : start + 8].partition(b" ")[0]
        end = start + (int(digits) if digits.isdigit() else 0)
        key, equals, value = content[start + len(digits) + 1 : end].partition(b"=")
        if not start < end <= len(content) or not equals or not value.endswith(b"\n"):
            raise tarfile.HeaderError("a record of a pax header has another length")
        records[_text(key)] = value[:-1]
        start = end
    return records
