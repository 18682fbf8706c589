"""Tables in MATLAB files, read by SciPy in a process of its own.

SciPy's reader is written for intact files: about one damaged file in a hundred crashes the process
that reads it. Here it crashes a child, and the user gets an error that names the file.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import readable

LONGEST = 300  # seconds; the tables of public data sets take one
KEPT = 16  # tables that are not read again
READER = """
import io, json, sys
import numpy, scipy.io
variable, *fields = sys.argv[1:]
content = io.BytesIO(sys.stdin.buffer.read())
table = numpy.atleast_1d(scipy.io.loadmat(content, squeeze_me=True)[variable])
columns = [table[field] for field in fields] or [table]
print(json.dumps([[str(value) for value in row] for row in zip(*columns)]))
"""


def read_table(path: Path, variable: str, fields: Sequence[str] = ()) -> list[list[str]]:
    """A table in a MATLAB file.

    Args:
        path: the file.
        variable: a structure array, or a cell array, in it.
        fields: of the structure, the columns wanted; none for a cell array, which is one column.

    Returns:
        The rows, each with a text for every column; numbers as Python writes them.

    Raises:
        MissingFileError: if the file does not exist.
        UsageError: if it is damaged or holds no such table.
    """
    expected = f"a MATLAB file with the table {variable!r}"
    with readable(path, expected):
        printed, reason = _read(path.read_bytes(), variable, *fields)
        if reason:
            raise UsageError(
                f"{path} cannot be read as {expected} ({shown(reason)}); it is damaged or "
                "incomplete, fetch it again"
            )
        rows: list[list[str]] = json.loads(printed)
        return rows


@functools.lru_cache(KEPT)
def _read(content: bytes, *words: str) -> tuple[bytes, str]:
    """What the child prints for the content of a file, and why it failed; empty if it did not."""
    command = [sys.executable, "-c", READER, *words]
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}  # no modules of the working directory
    done = subprocess.run(
        command, input=content, capture_output=True, timeout=LONGEST, env=safe, check=False
    )
    if not done.returncode:
        return done.stdout, ""
    lines = done.stderr.decode(errors="replace").splitlines()
    return b"", lines[-1] if lines and done.returncode > 0 else "SciPy's reader crashed"
