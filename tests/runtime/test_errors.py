from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangent_arithmetic.runtime.errors import (
    MissingFileError,
    RunError,
    UnwritableError,
    UsageError,
    closest,
    entry_point,
    printable,
    shown,
    unknown,
)
from tangent_arithmetic.runtime.processes import Stopped

HOSTILE = "a\x1b[31m\x07\u202e\ud800" + "x" * 5_000_000
PRINTING = """
import sys
from tangent_arithmetic.runtime.errors import entry_point
@entry_point
def main(argv=None):
    for i in range(int(sys.argv[1])):
        print(sys.argv[2], i)
    return 0
raise SystemExit(main())
"""


def test_closest_sorts_by_similarity_then_alphabet() -> None:
    assert closest("mnst", ["DTD", "SVHN", "MNIST"])[0] == "MNIST"
    assert closest("x", ["c", "a", "b"]) == ["a", "b", "c"]


@settings(deadline=None, max_examples=50)
@given(choices=st.lists(st.text("abAB", max_size=4), min_size=1, max_size=5), data=st.data())
def test_closest_reorders_the_choices_and_finds_an_exact_one(
    choices: list[str], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(choices))
    ordered = closest(name, choices)
    assert sorted(ordered) == sorted(choices)
    assert ordered[0].lower() == name.lower()


def test_errors_of_users_are_usage_errors() -> None:
    error = unknown("suite", "clip9", ["embedded", "clip8"])
    assert isinstance(error, UsageError)
    assert str(error) == "unknown suite 'clip9'; choose from clip8, embedded"
    missing = MissingFileError("no checkpoint. Make it with: python src/finetune.py")
    assert isinstance(missing, UsageError) and isinstance(missing, FileNotFoundError)
    assert str(missing) == "no checkpoint. Make it with: python src/finetune.py"
    unwritable = UnwritableError(Path("a\x1b[31m"), "the disk is full")
    assert str(unwritable).startswith(r"cannot write a\x1b[31m: the disk is full")


def failing(error: BaseException) -> Callable[[Sequence[str]], int]:
    """A command that raises this error."""

    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("expected this, got that"), 2, "error: expected this, got that"),
        (MissingFileError("no such file"), 2, "error: no such file"),
        (RunError("rank 1 failed"), 1, "error: rank 1 failed"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            2,
            f"error: {'x' * 120}...: File name too long (OSError)",
        ),
        (IsADirectoryError(errno.EISDIR, "A folder", "a"), 2, "error: a: A folder (IsADirectory"),
        (OSError("cannot identify image"), 2, "error: cannot identify image (OSError)"),
        (ConnectionResetError(), 2, "error:  (ConnectionResetError)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("of a list"), 1, "error: out of memory (of a list); try a smaller"),
        (torch.OutOfMemoryError("CUDA"), 1, "error: out of memory (CUDA); try a smaller"),
        (RuntimeError("x: can't allocate memory"), 1, "error: out of memory (x: can't allocate"),
    ],
)
def test_expected_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error)([]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1
    assert captured.out == ""


def test_stopped_runs_keep_their_exit_code_and_defects_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match=r"^143$"):
        failing(Stopped(15))([])
    assert capsys.readouterr().err == "stopped by SIGTERM\n"
    with pytest.raises(ValueError, match="a defect"):
        failing(ValueError("a defect"))([])


@pytest.mark.parametrize(
    ("kind", "longest"),
    [(UsageError, 45_000), (MissingFileError, 45_000), (RunError, 250_000), (shown, 1500)],
)
def test_untrusted_text_is_escaped_and_cut(kind: type[Exception], longest: int) -> None:
    text = str(kind(HOSTILE))
    assert text.startswith(r"a\x1b[31m\x07\u202e\ud800xxx") and len(text) < longest
    assert text.isprintable()


@given(text=st.text(), longest=st.integers(4, 50))
def test_printable_keeps_lines_and_printable_characters(text: str, longest: int) -> None:
    safe = printable(text, longest)
    assert all(line.isprintable() for line in safe.split("\n"))
    assert safe == text or not text.replace("\n", "").isprintable() or len(text) > longest
    assert shown(text).isprintable()


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    command = [sys.executable, "-c", PRINTING, "1000000", "a line"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as printing:
        assert printing.stdout is not None and printing.stderr is not None
        assert printing.stdout.readline() == b"a line 0\n"
        printing.stdout.close()
        assert (printing.wait(timeout=60), printing.stderr.read()) == (141, b"")


@pytest.mark.parametrize("count", ["1", "100000"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_unwritable_output_is_an_error(count: str) -> None:
    command = [sys.executable, "-c", PRINTING, count, "a line"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device (OSError)\n")


def test_characters_that_stdout_cannot_encode_are_escaped() -> None:
    command = [sys.executable, "-c", PRINTING, "1", "\xe9\udcff"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, env=env)
    assert done.stdout == rb"\xe9\udcff 0" + os.linesep.encode()


def test_entry_point_passes_arguments_and_the_code_of_success() -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        return len(argv or ())

    assert main(["a", "b", "c"]) == 3
    assert main.__name__ == "main"
