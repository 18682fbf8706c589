"""Errors for users, whose messages say what was expected, what was got, and what to do."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, cast

from tangent_arithmetic.runtime.processes import Stopped

Main = TypeVar("Main", bound=Callable[..., int])
LONGEST_MESSAGE = 4000
LONGEST_TRACE = 20_000
LONGEST_NAME = 120


def printable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """The text made safe for a terminal: control characters escaped, the middle of long text cut.

    Args:
        text: any text, for instance with names from untrusted files; line breaks are kept.
        longest: number of characters to keep.
    """
    if len(text) > longest:
        head, tail = text[: longest * 3 // 4], text[len(text) - longest // 4 :]
        text = f"{head} [... {len(text) - len(head) - len(tail)} characters ...] {tail}"
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def shown(name: object, longest: int = LONGEST_NAME) -> str:
    """An untrusted name made safe for a message: one printable line, truncated if long."""
    text = str(name)
    cut = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class UsageError(ValueError):
    """A user's mistake. Commands print its message without a traceback and exit with code 2.

    Args:
        message: what was expected, what was got, what to do; stored after `printable`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class MissingFileError(UsageError, FileNotFoundError):
    """A required file does not exist; the message names the command that makes it."""

    __str__ = ValueError.__str__


class UnwritableError(UsageError, OSError):
    """A file cannot be written, for instance because the disk is full.

    Args:
        path: the file.
        reason: why it cannot be written.
    """

    __str__ = ValueError.__str__

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"cannot write {path}: {reason}; make room there or name another folder. Existing "
            "files are unchanged"
        )


class PictureError(UsageError):
    """An image cannot be read, or its label is invalid; the message names the file.

    Data-loading processes pass errors on as the text of a traceback; this extracts the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class DivergedError(UsageError, FloatingPointError):
    """Training diverged: the loss or a gradient is not finite."""


class RunError(RuntimeError):
    """A process of the run failed. Commands print its message and exit with code 1.

    Args:
        message: the cause, possibly with a traceback; stored after `printable`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message), LONGEST_TRACE))


def closest(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, sorted by similarity to `name`, most similar first."""

    def similarity(choice: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), choice.lower()).ratio()

    return sorted(choices, key=lambda choice: (-similarity(choice), choice))


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `choices`."""
    text = shown(name)
    return UsageError(f"unknown {kind} '{text}'; choose from {', '.join(closest(text, choices))}")


def hub_failure(error: Exception) -> str:
    """Why a request to the Hugging Face hub failed, for the end of a message."""
    from huggingface_hub import constants

    reason = str(error).strip().partition("\n")[0] or "no reason given"
    offline = ". HF_HUB_OFFLINE is set: unset it to use the network"
    return f"({type(error).__name__}: {reason}){offline if constants.HF_HUB_OFFLINE else ''}"


def system_failure(error: OSError) -> UsageError:
    """The `UsageError` for a system error about a file, a device or a connection."""
    names = [shown(name) for name in (error.filename, error.filename2) if name is not None]
    reason = error.strerror if error.errno is not None and error.strerror else str(error)
    return UsageError(
        f"{': '.join([*names, shown(reason, LONGEST_MESSAGE)])} ({type(error).__name__})"
    )


def entry_point(main: Main) -> Main:
    """Decorates a command's `main(argv)`: expected errors become a message and an exit code.

    2 for `UsageError` and `OSError`, 1 for `RunError` and out of memory, 130 for Ctrl-C (reported
    by rank 0), 141 for a closed output pipe.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            if hasattr(sys.stdout, "reconfigure"):  # escape what stdout cannot encode
                sys.stdout.reconfigure(errors="backslashreplace")
            code = int(main(argv))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except UsageError as error:
            return _report(f"error: {error}", 2)
        except RunError as error:
            return _report(f"error: {error}", 1)
        except KeyboardInterrupt:
            return _report("interrupted", 128 + signal.SIGINT, rank0_only=True)
        except Stopped as stopped:
            _report(f"stopped by {signal.Signals(stopped.signum).name}", 0, rank0_only=True)
            raise
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _pipe_closed():
                return 128 + 13  # SIGPIPE, which Windows does not define
            _discard_unwritable()
            return _report(f"error: {system_failure(error)}", 2)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            advice = "try a smaller --batch-size, or another --device"
            return _report(f"error: out of memory ({shown(error, 300)}); {advice}", 1)

    return cast(Main, guarded)


def _report(message: str, code: int, rank0_only: bool = False) -> int:
    if not rank0_only or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)  # noqa: T201 - a command's message
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or PyTorch ran out of memory; on CPU, PyTorch has no error type for it."""
    typed = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return typed or "can't allocate memory" in str(error)


def _discard_unwritable() -> None:
    """Discards output that cannot be written, which Python would try again when it exits."""
    with contextlib.suppress(AttributeError, OSError):  # stdout is missing or not a file
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _pipe_closed() -> bool:
    """Whether the reader of stdout has closed it; the remaining output is then discarded."""
    if not hasattr(select, "poll"):  # Windows
        return False
    with contextlib.suppress(AttributeError, OSError):  # stdout is missing or not a file
        output, poll = sys.stdout.fileno(), select.poll()
        poll.register(output, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
            return True
    return False
