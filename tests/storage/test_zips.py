"""Zip archives with a long or wrong directory; `tests/data` tests unpacking."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tangent_arithmetic.storage.zips import open_zip


@pytest.mark.parametrize("before", [b"", b"other bytes"])
def test_members_side_by_side_are_read(before: bytes, tmp_path: Path) -> None:
    path, members = tmp_path / "x.zip", {name: name.encode() * 10 for name in ("a", "b", "ü" * 50)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.comment = b"a comment " * 1000
    path.write_bytes(before + path.read_bytes())
    with open_zip(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == members


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
