"""Errors whose message is all a user needs: what was expected, what was got, the way out."""

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
    """The text as a terminal can safely show it: control characters escaped, the middle cut out.

    Args:
        text: any text, for instance with names from a file that somebody else made.
        longest: characters to keep; line breaks are kept as well.
    """
    if len(text) > longest:
        head, tail = text[: longest * 3 // 4], text[len(text) - longest // 4 :]
        text = f"{head} [... {len(text) - len(head) - len(tail)} characters ...] {tail}"
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def shown(name: object, longest: int = LONGEST_NAME) -> str:
    """A name from a file, for a message: on one line, printable, cut where it is long."""
    text = str(name)
    cut = text if len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class UsageError(ValueError):
    """A user's mistake. Entry points print the message without a trace and end with code 2.

    Args:
        message: what was expected, what was got, the way out; kept as `printable` gives it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class MissingFileError(UsageError, FileNotFoundError):
    """A file that a command needs is not there; the message names the command that makes it."""

    __str__ = ValueError.__str__


class UnwritableError(UsageError, OSError):
    """A file cannot be written, for instance since the disk is full.

    Args:
        path: the file.
        reason: what keeps it from being written.
    """

    __str__ = ValueError.__str__

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"cannot write {path}: {reason}; make room there or name another folder. What was "
            "there before is unchanged"
        )


class PictureError(UsageError):
    """A picture cannot be read, or its label is none; the message names the file.

    A data-loading process hands its errors on as the text of a trace; the message is its end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class DivergedError(UsageError, FloatingPointError):
    """Training came to a loss or a gradient that is no finite number."""


class RunError(RuntimeError):
    """A process of the run came to an end; entry points print the message and end with code 1.

    Args:
        message: what happened to it, perhaps with its trace; kept as `printable` gives it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message), LONGEST_TRACE))


def closest(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, those spelt most like `name` first."""

    def likeness(choice: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), choice.lower()).ratio()

    return sorted(choices, key=lambda choice: (-likeness(choice), choice))


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `choices`."""
    text = shown(name)
    return UsageError(f"unknown {kind} '{text}'; choose from {', '.join(closest(text, choices))}")


def hub_failure(error: Exception) -> str:
    """Why the Hugging Face hub did not answer, in brackets, and whether it is asked at all."""
    from huggingface_hub import constants

    reason = str(error).strip().partition("\n")[0] or "no reason given"
    offline = (
        ". The hub is not asked, since HF_HUB_OFFLINE is set: unset it where there is a network"
    )
    return f"({type(error).__name__}: {reason}){offline if constants.HF_HUB_OFFLINE else ''}"


def system_failure(error: OSError) -> UsageError:
    """The error of ours for what the system says of a file, a device or a connection."""
    names = [shown(name) for name in (error.filename, error.filename2) if name is not None]
    reason = error.strerror if error.errno is not None and error.strerror else str(error)
    return UsageError(
        f"{': '.join([*names, shown(reason, LONGEST_MESSAGE)])} ({type(error).__name__})"
    )


def entry_point(main: Main) -> Main:
    """Decorates a script's `main(argv)`: errors that say it all become a message and an exit code.

    2 for a `UsageError` and for what the system refuses (`OSError`), 1 for a `RunError` and where
    memory does not suffice, 130 for Ctrl-C, of which the first process of a group tells, and 141
    where nobody reads the output any more.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            _write_anything()
            code = int(main(argv))
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
        except UsageError as error:
            return _told(f"error: {error}", 2)
        except KeyboardInterrupt:
            return _told("interrupted", 128 + signal.SIGINT, first_only=True)
        except Stopped as stopped:
            _told(f"stopped by {signal.Signals(stopped.signum).name}", 0, first_only=True)
            raise
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _unread():
                return 128 + 13  # as if by SIGPIPE, which Windows has not
            return _told(f"error: {system_failure(error)}", 2)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RunError):
                return _told(f"error: {error}", 1)
            if not _is_out_of_memory(error):
                raise
            advice = "try a smaller --batch-size, or another --device"
            return _told(f"error: out of memory ({shown(error, 300)}); {advice}", 1)

    return cast(Main, guarded)


def _told(message: str, code: int, first_only: bool = False) -> int:
    if not first_only or os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)  # noqa: T201 - a script's own message
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether that is what Python or PyTorch says; on a CPU it has no type of its own."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _write_anything() -> None:
    """Has letters that the output's encoding does not know escaped, instead of an error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _unread() -> bool:
    """Whether the reader of the output has gone; what is left of the output is then dropped."""
    if not hasattr(select, "poll"):  # Windows, where pipes break otherwise
        return False
    with contextlib.suppress(AttributeError, OSError):  # no output, or one that is no file
        output, poll = sys.stdout.fileno(), select.poll()
        poll.register(output, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
            return True
    return False
