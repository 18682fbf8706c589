"""The command line: flags as text, made into a `Config`.

`parse_arguments(argv)` returns a `Config`; `--batch-size` and `--batch_size` both set
`Config.batch_size`. Every command accepts every flag, so that one set of flags fits all of a run's
commands; its help shows those that it uses, see `run/usage.py`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from tangent_arithmetic.run.config import (
    GROUPS,
    LARGEST_SEED,
    LONGEST_PART,
    LONGEST_PATH,
    Config,
    Names,
    Numeral,
    checked,
    choices_of,
    pathname,
    settings,
)
from tangent_arithmetic.run.parser import Parser, dashed, refuse, refuse_words
from tangent_arithmetic.runtime.errors import UsageError, unknown

__all__ = [
    "LARGEST_SEED",
    "LONGEST_PART",
    "LONGEST_PATH",
    "Config",
    "Parser",
    "checked",
    "flags",
    "paragraphs",
    "parse_arguments",
    "parse_names",
    "pathname",
]

HELP = {"-h", "--help"}


def _check_values(words: Sequence[str]) -> None:
    """Ends the program if a flag that takes a value has none."""
    kinds = {f"--{name.replace('_', '-')}": kind for name, (_, kind, _) in settings().items()}
    for word, value in itertools.pairwise([*words, "--"]):
        if kinds.get(word, bool) is not bool and value.startswith("--"):
            refuse(f"{word}: expected a value, got nothing")


def _metavar(item: Field[Any], kind: Any, choices: Sequence[str]) -> str:
    usual = {int: "N", float: "N", Names: "A,B"}
    place = "PATH" if item.metadata.get("path") else item.name.upper()
    named = item.metadata.get("metavar") or usual.get(kind, place)
    return f"{{{','.join(choices)}}}" if choices else named


def _numeral(words: list[str]) -> str:
    return Numeral(words[0])


def _annotated(
    item: Field[Any], kind: Any, choices: Sequence[str], offered: bool, text: str | None
) -> Any:
    """The type of a flag for tyro, with its help; the value of a flag stays text.

    Choices are named in the help, and offered by shell completion; `checked` refuses others.
    """
    import tyro

    default = item.default if item.default_factory is MISSING else item.default_factory()
    told = ",".join(default) if isinstance(default, list) else default
    hint = "" if default is None or text else f"(default: {told})"
    about = tyro.conf.arg(help=text or item.metadata["help"], help_behavior_hint=hint)
    if kind is bool:
        return Annotated[bool, about]
    own = choices_of(item, kind)
    parser = tyro.constructors.PrimitiveConstructorSpec[str](
        nargs=1,
        metavar=_metavar(item, kind, choices if own else ()),
        instance_from_str=_numeral if kind in (int, float) else operator.itemgetter(0),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [value],
        choices=tuple(choices) if offered and choices else None,
    )
    return Annotated[Any, parser, about]


def flags(
    shown: Iterable[str] | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
    texts: Mapping[str, str] | None = None,
    first: Mapping[str, type] | None = None,
) -> type:
    """The flags as a class for tyro, which reads their text; `checked` makes values of it.

    Args:
        shown: the flags, by the names of `Config`; None for all.
        choices: values that a flag can have, where its type does not say; by its name.
        texts: help that a command has for a flag, instead of its own.
        first: groups of further flags, as dataclasses, before these.

    Returns:
        A dataclass with a field a group, each a dataclass of flags.
    """
    names = [name for name, (item, *_) in settings().items() if not item.metadata.get("hidden")]
    chosen = set(names if shown is None else shown)
    groups: list[Any] = [
        (name, kind, field(default_factory=kind)) for name, kind in (first or {}).items()
    ]
    for group in GROUPS:
        members = []
        for name in names:
            item, kind, _ = settings()[name]
            if name in chosen and item.metadata["group"] == group:
                known = (choices or {}).get(name) or choices_of(item, kind)
                text = (texts or {}).get(name)
                about = _annotated(item, kind, known, choices is not None, text)
                members.append((name, about, copy.copy(item)))
        if members:
            made = make_dataclass(group, members)
            groups.append((group, made, field(default_factory=made)))
    return make_dataclass("Flags", groups)


@functools.cache
def _plain() -> type:
    """The flags for parsing, whose choices are checked later."""
    return flags()


def values_of(parsed: object) -> dict[str, Any]:
    """The text of every flag in an object of the class `flags()`, by name."""
    return {name: text for group in vars(parsed).values() for name, text in vars(group).items()}


def paragraphs(text: str | None) -> str:
    """A command's description for tyro, which keeps the ends of indented lines only."""
    return "\n".join(f" {line}" if line else "" for line in (text or "").strip().splitlines())


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> Config:
    """Parses the command line.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` if None.
        description: the command's own text for `--help`.

    Returns:
        The settings; paths have `~` expanded, comma lists are lists.

    Raises:
        SystemExit: with code 2 and a message, for an unknown flag or an invalid value.
    """
    return parse_names((), "", argv, description)[1]


def parse_names(
    known: Sequence[str] | None,
    noun: str,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    shown: type | None = None,
) -> tuple[list[str], Config]:
    """Parses a command line with names among its flags, in any order.

    Args:
        known: the names to choose from; None if any name will do.
        noun: what they name, for messages.
        argv: as in `parse_arguments`.
        description: as there.
        prog: the command in the help; the program's name if None.
        shown: the flags in the help, see `flags`; None for all.

    Returns:
        The names in the order of the command line, and the settings.

    Raises:
        UsageError: if a name is not known.
    """
    import tyro

    words = dashed(argv)
    _check_values(words)
    asked = shown is not None and bool(HELP & set(words))
    parsed: Any
    parsed, names = tyro.cli(
        shown if asked and shown is not None else flags() if HELP & set(words) else _plain(),
        prog=prog or Path(sys.argv[0]).name,
        description=paragraphs(description),
        args=["--help"] if asked else words,
        return_unknown_args=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    values = values_of(parsed)
    no_names = known is not None and not known
    if names and (no_names or any(name.startswith("-") for name in names)):
        refuse_words(names, dashed([f"--{name}" for name in values]))
    try:
        config = Config(**{name: checked(name, value) for name, value in values.items()})
    except UsageError as error:
        refuse(error)
    for name in names:
        if known is not None and name not in known:
            raise unknown(noun, name, known)
    return names, config
