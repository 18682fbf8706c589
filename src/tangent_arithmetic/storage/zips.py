"""Zip archives opened within bounds: a directory that is not too long, members side by side."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_DIRECTORY = (
    4 << 20
)  # bytes; a member has 46 and its name there, and 10 times that in memory
LOCAL_HEADER = 30  # bytes before the name of a member


class _Sparing(io.BufferedReader):
    """A file from which no more than so many bytes are read at once.

    Attributes:
        longest: bytes; the directory is read at once, whatever length the archive claims.
    """

    longest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as usual.

        Raises:
            zipfile.BadZipFile: for more bytes than that.
        """
        if size is not None and size > self.longest:
            raise zipfile.BadZipFile(f"its directory is longer than {self.longest:,} bytes")
        return super().read(size)


@contextmanager
def open_zip(path: Path, longest: int = LONGEST_DIRECTORY) -> Iterator[zipfile.ZipFile]:
    """Opens an archive whose members can be read one by one in no more bytes than it has.

    Args:
        path: the archive.
        longest: bytes that its directory may have.

    Raises:
        zipfile.BadZipFile: if its directory is longer, or members overlap. Other errors of
            `zipfile` pass through.
    """
    with _Sparing(io.FileIO(path)) as file:
        file.longest = longest
        with zipfile.ZipFile(file) as archive:
            file.longest = path.stat().st_size
            end = 0
            for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
                if member.header_offset < end:
                    raise zipfile.BadZipFile("its members overlap")
                end = member.header_offset + LOCAL_HEADER + member.compress_size
            if end > archive.start_dir:
                raise zipfile.BadZipFile("a member overlaps the directory")
            yield archive
