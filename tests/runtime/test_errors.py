from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
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


def test_closest_prefers_the_likeliest_spelling_in_any_case() -> None:
    assert closest("mnst", ["DTD", "SVHN", "MNIST"])[0] == "MNIST"


def test_closest_breaks_ties_by_the_alphabet() -> None:
    assert closest("x", ["c", "a", "b"]) == ["a", "b", "c"]


@settings(deadline=None, max_examples=50)
@given(choices=st.lists(st.text("abAB", max_size=4), min_size=1, max_size=5), data=st.data())
def test_closest_reorders_the_choices_and_finds_an_exact_one(
    choices: list[str], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(choices))
    found = closest(name, choices)
    assert sorted(found) == sorted(choices)
    assert found[0].lower() == name.lower()


def test_unknown_says_what_was_got_and_what_there_is() -> None:
    error = unknown("suite", "clip9", ["embedded", "clip8"])
    assert isinstance(error, UsageError)
    assert str(error) == "unknown suite 'clip9'; choose from clip8, embedded"


def test_a_missing_file_is_both_kinds_of_error_and_keeps_its_message() -> None:
    error = MissingFileError("no checkpoint. Make it with: python src/finetune.py")
    assert isinstance(error, UsageError)
    assert isinstance(error, FileNotFoundError)
    assert str(error) == "no checkpoint. Make it with: python src/finetune.py"


@pytest.mark.parametrize("kind", [UsageError, MissingFileError])
def test_entry_point_turns_a_usage_error_into_a_message_and_code_2(
    kind: type[UsageError], capsys: pytest.CaptureFixture[str]
) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise kind("expected this, got that")

    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: expected this, got that\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("rank 1 failed"), 1, "error: rank 1 failed"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            2,
            f"error: {'x' * 120}...: File name too long (OSError)",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"),
            2,
            "error: a/b: Not a directory (NotADirectoryError)",
        ),
        (OSError("cannot identify image"), 2, "error: cannot identify image (OSError)"),
        (ConnectionResetError(), 2, "error:  (ConnectionResetError)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("of a list"), 1, "error: out of memory (of a list); try a smaller"),
        (torch.OutOfMemoryError("CUDA"), 1, "error: out of memory (CUDA); try a smaller"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "error: out of memory (DefaultCPUAllocator: can't allocate memory)",
        ),
    ],
)
def test_what_the_system_and_the_user_end_is_told_in_a_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    assert main([]) == code
    told = capsys.readouterr().err
    assert told.startswith(message) and told.count("\n") == 1


def test_a_run_that_a_signal_stopped_says_so_and_keeps_its_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise Stopped(15)

    with pytest.raises(SystemExit, match=r"^143$"):
        main([])
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


@pytest.mark.parametrize(
    ("kind", "longest"),
    [(UsageError, 45_000), (MissingFileError, 45_000), (RunError, 250_000), (shown, 1500)],
)
def test_names_of_others_are_printable_and_cut(kind: type[Exception], longest: int) -> None:
    text = str(kind(HOSTILE))
    assert text.startswith(r"a\x1b[31m\x07\u202e\ud800xxx") and len(text) < longest
    assert text.isprintable()


@given(text=st.text(), longest=st.integers(4, 50))
def test_printable_text_keeps_lines_and_what_is_printable(text: str, longest: int) -> None:
    made = printable(text, longest)
    assert all(line.isprintable() for line in made.split("\n"))
    assert made == text or not text.replace("\n", "").isprintable() or len(text) > longest
    assert shown(text).isprintable()


def test_a_path_in_a_message_is_printable() -> None:
    error = UnwritableError(Path("a\x1b[31m"), "the disk is full")
    assert str(error).startswith(r"cannot write a\x1b[31m: the disk is full")


def test_output_that_nobody_reads_ends_the_command_quietly() -> None:
    command = [sys.executable, "-c", PRINTING, "1000000", "a line"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as printing:
        assert printing.stdout is not None and printing.stderr is not None
        assert printing.stdout.readline() == b"a line 0\n"
        printing.stdout.close()
        assert (printing.wait(timeout=60), printing.stderr.read()) == (141, b"")


@pytest.mark.parametrize("count", ["1", "100000"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_told(count: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTING, count, "a line"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device (OSError)\n")


def test_letters_that_the_output_has_not_are_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, "1", "\xe9\udcff"],
        capture_output=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == rb"\xe9\udcff 0" + os.linesep.encode()


def test_entry_point_passes_arguments_and_the_code_of_success() -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        return len(argv or ())

    assert main(["a", "b", "c"]) == 3
    assert main.__name__ == "main"


def test_entry_point_does_not_hide_our_own_defects() -> None:
    @entry_point
    def main(argv: Sequence[str] | None = None) -> int:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        main([])
