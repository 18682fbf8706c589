"""The parser of commands with a few flags of their own, and the form of messages of all."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import dedent, indent
from typing import Any, NoReturn

from tangent_arithmetic.runtime.errors import printable, unknown
from tangent_arithmetic.runtime.ranges import number

WIDEST = 80  # columns of a help text


def _framed(title: str, lines: Sequence[str], width: int) -> str:
    """Lines in a frame with a title; a line that is too long sticks out."""
    top = f"╭─ {title} " + "─" * (width - len(title) - 5) + "╮"
    body = [f"│ {line:<{width - 4}} │" for line in lines]
    return "\n".join([top, *body, "╰" + "─" * (width - 2) + "╯\n"])


class Parser(argparse.ArgumentParser):
    """A parser for commands with a few flags of their own; its errors are `parse_arguments`'s."""

    def __init__(self, **options: Any) -> None:
        plain = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{**plain, **options})

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Adds an argument; a flag that takes a path shows PATH, another one N or TEXT."""
        plain = not {"metavar", "choices", "action"} & options.keys()
        if plain and str(names[0]).startswith("--"):
            kind = options.get("type")
            numeric = kind in (int, float) or getattr(kind, "__module__", "") == number.__module__
            options["metavar"] = "PATH" if kind is Path else "N" if numeric else "TEXT"
        return super().add_argument(*names, **options)

    def format_help(self) -> str:
        """Usage, description and, in a frame each, the groups of arguments, as of all commands."""
        width = min(WIDEST, max(40, shutil.get_terminal_size().columns))
        parts = [self.format_usage()]
        for text in (self.description, self.epilog):
            parts += [indent(text.strip(), " ") + "\n"] if text else []
        for group in self._action_groups:
            formatter = argparse.HelpFormatter(self.prog, max_help_position=19, width=width - 4)
            formatter.add_arguments(group._group_actions)
            if body := formatter.format_help().strip("\n"):
                parts.append(_framed(str(group.title), dedent(body).splitlines(), width))
        return "\n".join(parts[:-1]) + ("\n" if len(parts) > 1 else "") + parts[-1]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, with dashes for the underscores of flags."""
        return super().parse_known_args(dashed(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong with the command line, and ends with code 2."""
        if message.startswith("unrecognized arguments: "):
            refuse_words(message.split()[2:], self._option_string_actions)
        refuse(message)


def refuse(message: object) -> NoReturn:
    """Ends the program with code 2 and a message."""
    print(f"error: {printable(str(message))}", file=sys.stderr)  # noqa: T201 - the command's
    raise SystemExit(2)


def refuse_words(words: Sequence[str], options: Iterable[str]) -> NoReturn:
    """Ends the program because of unknown arguments; the message names the nearest flag."""
    flag = next((word for word in words if word.startswith("--")), None)
    if flag is None:
        refuse(f"unrecognized arguments: {' '.join(words)}")
    known = [option for option in options if option.startswith("--")]
    refuse(unknown("flag", flag.partition("=")[0], known))


def dashed(argv: Sequence[str] | None) -> list[str]:
    """The arguments, `sys.argv[1:]` if None, with dashes for the underscores of flags."""
    parts = [word.partition("=") for word in (sys.argv[1:] if argv is None else argv)]
    return [(n.replace("_", "-") if n.startswith("--") else n) + e + v for n, e, v in parts]
