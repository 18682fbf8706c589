"""Tables in MATLAB files: what is read, and that no file harms the process that asks for it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage import matlab
from tangent_arithmetic.storage.matlab import read_table


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "table.mat"
    rows = np.array([("a.jpg", 3), ("b c.jpg", 12)], dtype=[("fname", "O"), ("class", "O")])
    names = np.array(["one", "two"], dtype=object)
    scipy.io.savemat(path, {"rows": rows, "single": rows[:1], "names": names})
    return path


def test_structures_and_cell_arrays(good: Path) -> None:
    assert read_table(good, "rows", ("fname", "class")) == [["a.jpg", "3"], ["b c.jpg", "12"]]
    assert read_table(good, "single", ("class",)) == [["3"]]
    assert read_table(good, "names") == [["one"], ["two"]]


def test_what_is_missing_is_said(good: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no\.mat does not exist"):
        read_table(good.with_name("no.mat"), "rows")
    with pytest.raises(UsageError, match=r"table\.mat cannot be read as .*'synsets' \(KeyError"):
        read_table(good, "synsets")
    with pytest.raises(UsageError, match="no field of name WNID"):
        read_table(good, "rows", ("WNID",))


def test_a_crash_of_the_reader_is_an_error(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab, "READER", "import os; os.abort()")
    with pytest.raises(UsageError, match=r"table\.mat cannot be read as .*reader crashed"):
        read_table(good, "rows", ("fname",))


@pytest.mark.parametrize("at", [448, 665, 784, 840])
def test_files_that_crash_scipy(at: int, good: Path) -> None:
    """A bit of each of these bytes crashed SciPy 1.17; the process that asks must survive."""
    content = bytearray(good.read_bytes())
    content[at] ^= 1 << 2
    good.write_bytes(content)
    with contextlib.suppress(UsageError):
        assert all(len(row) == 2 for row in read_table(good, "rows", ("fname", "class")))
