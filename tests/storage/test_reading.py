from __future__ import annotations

import struct
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from tangent_arithmetic.merging.weights import mapped
from tangent_arithmetic.runtime.errors import MissingFileError, RunError, UsageError
from tangent_arithmetic.storage.checkpoints import read_header, read_safetensors
from tangent_arithmetic.storage.reading import (
    LONGEST_HEADER,
    check_header,
    inside,
    read_json,
    read_text,
    readable,
    refuse_pointer,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


PARSERS = [AssertionError("of a library"), SafetensorError("header"), yaml.YAMLError("bad")]
SYSTEM = [MemoryError(), RecursionError("deep"), PermissionError(13, "Permission denied")]


@pytest.mark.parametrize("error", [ValueError("bad"), EOFError(), *PARSERS, *SYSTEM])
def test_an_error_of_a_parser_names_the_file(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "file"
    message = rf"{path} cannot be read as a thing \({type(error).__name__}: "
    with pytest.raises(UsageError, match=message) as caught, readable(path, "a thing"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [UsageError("mine"), RunError("mine"), KeyboardInterrupt()])
def test_errors_of_ours_and_of_the_user_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, readable("file", "a thing"):
        raise error
    assert caught.value is error


def test_a_file_in_a_folder_that_is_read_is_named(tmp_path: Path) -> None:
    message = rf"{tmp_path} .*{tmp_path}/inner: No such file"
    with pytest.raises(UsageError, match=message), readable(tmp_path, "a folder"):
        (tmp_path / "inner").read_text()


@pytest.mark.parametrize("read", [read_text, read_json])
def test_a_file_that_is_not_there_or_no_file(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(MissingFileError, match=r"none\.json does not exist, expected a"):
        read(tmp_path / "none.json")
    with pytest.raises(UsageError, match=rf"{tmp_path} cannot be read as .*Is a directory"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read as .*File name too long"):
        read(tmp_path / ("x" * 300))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match=r"loop cannot be read as .*symbolic links"):
        read(loop)
    (tmp_path / "pointer").write_text(POINTER)
    for check in (read, refuse_pointer):
        with pytest.raises(UsageError, match=r"pointer is a Git LFS pointer, .* git lfs pull"):
            check(tmp_path / "pointer")
    (tmp_path / "other").write_text("version 2")
    for other in (tmp_path / "other", tmp_path / "none", tmp_path):
        refuse_pointer(other)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_only_utf_8_is_read_with_or_without_a_mark(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text('{"a": "ä"}', encoding=encoding)
    if encoding.startswith("utf-8"):
        assert read_text(path) == '{"a": "ä"}' and read_json(path) == {"a": "ä"}
        return
    for read in (read_text, read_json):
        with pytest.raises(UsageError, match=r"list\.txt cannot be read as a.*codec can't decode"):
            read(path)


@pytest.mark.parametrize("content", ["[]", "1", "null", "[" * 100_000, "", "{", '{"a": 1} x'])
def test_what_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(content)
    with pytest.raises(UsageError, match=r"facts\.json cannot be read as a JSON object"):
        read_json(tmp_path / "facts.json")


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "", ".", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "a\0b"]
)
def test_a_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^list\.txt is refused: it names '"):
        inside("list.txt", name)


@given(name=st.text())
def test_an_accepted_name_stays_inside(name: str) -> None:
    try:
        path = inside("list.txt", name)
    except UsageError:
        return
    assert (Path("/root") / path).parts[:2] == ("/", "root") and ".." not in path.parts


def test_long_json_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_arithmetic.storage.reading.LONGEST_JSON", 10)
    (tmp_path / "x.json").write_text('{"a": 12}')
    assert read_json(tmp_path / "x.json") == {"a": 12}
    (tmp_path / "x.json").write_text('{"a": 1234}')
    with pytest.raises(UsageError, match=r"x\.json cannot be read .*11 bytes, expected at most 10"):
        read_json(tmp_path / "x.json")


def test_the_longest_header_of_safetensors_follows_from_the_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length, size in ((LONGEST_HEADER, 100), (LONGEST_HEADER + 1000, 8000), (0, 0)):
        path.write_bytes((struct.pack("<Q", length) + bytes(size))[:size])
        check_header(path)
    for length in (LONGEST_HEADER + 14, 2**63):
        path.write_bytes(struct.pack("<Q", length) + bytes(92))
        with pytest.raises(UsageError, match=f"its header has {length:,} bytes, expected at most"):
            check_header(path)


def test_headers_out_of_proportion_are_refused_by_all_readers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(200_000)) + b"}}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    for read in (read_header, read_safetensors, lambda path: mapped([path])):
        with pytest.raises(UsageError, match=r"its header has 2,288,908 bytes"):
            read(path)
