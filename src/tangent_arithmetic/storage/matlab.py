"""Tables in MATLAB files, read by SciPy in a process of its own.

SciPy's reader is written for intact files: about one damaged file in a hundred crashes the process
that reads it. Here it crashes a child, and the user gets an error that names the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import readable

LONGEST = 300  # seconds; the tables of public data sets take one
READER = """
import json, sys
import numpy, scipy.io
path, variable, *fields = sys.argv[1:]
table = numpy.atleast_1d(scipy.io.loadmat(path, squeeze_me=True)[variable])
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
        path.stat()
        words = [sys.executable, "-c", READER, str(path), variable, *fields]
        safe = {**os.environ, "PYTHONSAFEPATH": "1"}  # no modules of the working directory
        done = subprocess.run(words, capture_output=True, timeout=LONGEST, env=safe, check=False)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            reason = lines[-1] if lines and done.returncode > 0 else "SciPy's reader crashed"
            raise UsageError(
                f"{path} cannot be read as {expected} ({shown(reason)}); it is damaged or "
                "incomplete, fetch it again"
            )
        rows: list[list[str]] = json.loads(done.stdout)
        return rows
