"""Class names and prompts of own data sets, from files or from the names of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tangent_arithmetic.data.base import distinct, spaced
from tangent_arithmetic.data.suites import DEFAULT_TEMPLATES, check_templates
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.storage.reading import read_text

CLASSNAMES, TEMPLATES = "classnames.txt", "templates.txt"  # in the folder of a data set


def untrained(name: str, place: object, what: str, extra: Sequence[object], remedy: str
) -> UsageError:  # fmt: skip
    """The error for classes that no training example has.

    Args:
        name: the data set.
        place: where they are.
        what: the training examples, such as "the training images".
        extra: the classes.
        remedy: what the user can do.
    """
    some = ", ".join(map(shown, extra[:10]))
    return UsageError(f"data set {name}: {place} has classes that {what} lack: {some}; {remedy}")


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, without empty ones and comments (`#`)."""
    lines = (line.rstrip("\r\n") for line in read_text(path).splitlines())
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def phrases(classes: Sequence[str], path: Path) -> tuple[str, ...]:
    """The class names in a file, in the order of the labels.

    Args:
        classes: names of the classes in the data, in the order of their labels.
        path: one phrase a line in this order, or lines `CLASS<TAB>PHRASE` in any order.

    Raises:
        UsageError: if the file does not name every class once.
    """
    lines = lines_of(path)
    pairs = [line.split("\t") for line in lines]
    if not any(len(pair) > 1 for pair in pairs):
        if len(lines) != len(classes):
            raise UsageError(
                f"{path}: expected {len(classes)} class names, one a line in the order of "
                f"{', '.join(map(shown, classes[:3]))}{', ...' if len(classes) > 3 else ''}; got "
                f"{len(lines)}"
            )
        return tuple(line.strip() for line in lines)
    named = {pair[0].strip(): pair[-1].strip() for pair in pairs if len(pair) == 2}
    if len(named) < len(lines) or set(named) != set(classes) or not all(named.values()):
        missing = [name for name in classes if not named.get(name)]
        extra = [name for name in named if name not in classes]
        raise UsageError(
            f"{path}: expected one line CLASS<TAB>PHRASE for each of the {len(classes)} classes, "
            f"got {len(lines)} lines; without a phrase: "
            f"{', '.join(map(shown, missing[:5])) or 'none'}; no class of the data: "
            f"{', '.join(map(shown, extra[:5])) or 'none'}"
        )
    return tuple(named[name] for name in classes)


Names = Path | tuple[str, ...] | None  # class names: a file, the names, or those of the data


def named(name: str, classes: Sequence[str], names: Names) -> tuple[str, ...]:
    """The class names as prompts use them.

    Args:
        name: the data set, for messages.
        classes: names of the classes in the data, in the order of their labels.
        names: a file, see `phrases`; one phrase per class; or None for those of the data, where
            underscores are spaces.

    Raises:
        UsageError: if the names do not fit the classes, or two are the same.
    """
    if names is None:
        return distinct(name, classes, list(map(spaced, classes)))
    if isinstance(names, Path):
        return distinct(name, classes, phrases(classes, names))
    if len(names) != len(classes):
        raise UsageError(
            f"data set {name}: expected {len(classes)} class names, in the order of "
            f"{', '.join(map(shown, classes[:3]))}{', ...' if len(classes) > 3 else ''}; got "
            f"{len(names)}"
        )
    return distinct(name, classes, names)


def given(names: Names) -> tuple[str, ...] | None:
    """The class names in the order of the labels, for data that have none; None if not given."""
    if isinstance(names, Path):
        return tuple(line.strip() for line in lines_of(names))
    return names


def templates_from(text: str, name: str) -> tuple[str, ...]:
    """The prompts that a flag or a key gives: a prompt with `{}`, or a file with one a line.

    Args:
        text: the prompt, or the path of the file.
        name: of the data set, for messages.

    Raises:
        UsageError: if it is neither, or a line has no single `{}`.
    """
    if "{" in text:
        return check_templates(name, (text,))
    path = expanded(text)
    if not path.is_file():
        raise UsageError(
            f"data set {name}: expected as template a prompt with {{}} for the class name or a "
            f"file of prompts, got '{shown(text)}', which is neither; write for instance "
            "'a photo of a {}.'"
        )
    return _from_file(path, name)


def _from_file(path: Path, name: str) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in lines_of(path))
    try:
        return check_templates(name, lines)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def templates_beside(root: Path, name: str) -> tuple[str, ...]:
    """The prompts in `templates.txt` in a data set's folder, or the default."""
    path = root / TEMPLATES
    return _from_file(path, name) if path.is_file() else DEFAULT_TEMPLATES
