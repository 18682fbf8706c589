"""Zip archives whose directory is long or says what is not so; `tests/data` has those to unpack."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tangent_arithmetic.storage.zips import open_zip


def test_members_side_by_side_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a", "b", "ü" * 50):
            archive.writestr(name, name * 10)
        archive.comment = b"a comment " * 1000
    with open_zip(tmp_path / "x.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            name: (name * 10).encode() for name in ("a", "b", "ü" * 50)
        }


def test_an_archive_after_other_bytes_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "1")
    (tmp_path / "y.zip").write_bytes(b"before" + (tmp_path / "x.zip").read_bytes())
    with open_zip(tmp_path / "y.zip") as archive:
        assert archive.read("a") == b"1"


def test_a_directory_is_not_read_if_it_is_long(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a" * 100, "")
    with (
        pytest.raises(zipfile.BadZipFile, match="directory is longer than 145 bytes"),
        open_zip(tmp_path / "x.zip", longest=145),
    ):
        pass
    with open_zip(tmp_path / "x.zip", longest=146):
        pass
