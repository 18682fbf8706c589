"""Zip archives with bounds: a central directory of limited size, members that do not overlap."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_DIRECTORY = 4 << 20  # bytes; an entry is 46 plus its name, and 10 times that in memory
LOCAL_HEADER = 30  # bytes before the name of a member


class _BoundedReader(io.BufferedReader):
    """A file that limits the size of a single read."""

    longest = 0  # bytes; `zipfile` reads the directory at once, whatever size the archive claims

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads as usual; a `BadZipFile` for more than `longest` bytes."""
        if size is not None and size > self.longest:
            raise zipfile.BadZipFile(f"its directory is longer than {self.longest:,} bytes")
        return super().read(size)


@contextmanager
def open_zip(path: Path, longest: int = LONGEST_DIRECTORY) -> Iterator[zipfile.ZipFile]:
    """Opens an archive, all of whose members together are no longer than the file.

    Args:
        path: the archive.
        longest: maximum size of its directory in bytes.

    Raises:
        zipfile.BadZipFile: if its directory is longer, or members overlap. Other errors of
            `zipfile` pass through.
    """
    with _BoundedReader(io.FileIO(path)) as file:
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
