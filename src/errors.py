"""Errors whose message is all a user needs: what was expected, what was got, the way out."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar, cast

Main = TypeVar("Main", bound=Callable[..., int])


class UsageError(ValueError):
    """A user's mistake. Entry points print the message without a trace and end with code 2."""


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
    """A process of the run came to an end; entry points print the message and end with code 1."""


def closest(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, those spelt most like `name` first."""

    def likeness(choice: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), choice.lower()).ratio()

    return sorted(choices, key=lambda choice: (-likeness(choice), choice))


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `choices`."""
    return UsageError(f"unknown {kind} {name!r}; choose from {', '.join(closest(name, choices))}")


def hub_failure(error: Exception) -> str:
    """Why the Hugging Face hub did not answer, in brackets, and whether it is asked at all."""
    from huggingface_hub import constants

    reason = str(error).strip().partition("\n")[0] or "no reason given"
    offline = (
        ". The hub is not asked, since HF_HUB_OFFLINE is set: unset it where there is a network"
    )
    return f"({type(error).__name__}: {reason}){offline if constants.HF_HUB_OFFLINE else ''}"


def entry_point(main: Main) -> Main:
    """Decorates a script's `main(argv)`: errors that say it all become a message and an exit code.

    2 for a `UsageError`, 1 for a `RunError`.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            return int(main(argv))
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201 - a script's own message
            return 2
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            return 1

    return cast(Main, guarded)
