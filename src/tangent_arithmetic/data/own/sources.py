"""The notation `NAME=SOURCE[?OPTION=VALUE&...]` of own data sets.

A source's options, which are keys in a suite's file too, are those in `OPTIONS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from tangent_arithmetic.data import suites
from tangent_arithmetic.data.suites import (
    DEFAULT_TEMPLATES,
    RegisteredSet,
    Task,
    check_name,
    check_templates,
)
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown, unknown
from tangent_arithmetic.runtime.private import expanded

if TYPE_CHECKING:
    from tangent_arithmetic.data.base import Splits

TRUTH = 'YAML reads yes, no, on and off as true or false. Quote it, as in "yes"'  # for errors
CHECKED = ("epochs", "multilabel", "templates")  # options that are never texts such as yes
TABLES = (".csv", ".tsv", ".parquet", ".jsonl")
COMMON = ("classnames", "templates", "epochs")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "folder": COMMON,
    "table": (*COMMON, "image", "text", "label", "split", "multilabel"),
    "hub": (*COMMON, "config", "image", "text", "label", "train", "val", "test"),
    "torchvision": COMMON,
    "python": COMMON,
    "suite": ("epochs",),
}


@dataclass(frozen=True)
class OwnSet:
    """A data set named by its source.

    Attributes:
        name: as flags spell it from now on.
        task: its epochs, or those that follow from its number of images.
        dataset: its entry in a suite; None if another suite has it.
        borrowed: that suite and its name there; None otherwise.
    """

    name: str
    task: Task
    dataset: RegisteredSet | None = None
    borrowed: tuple[str, str] | None = None


def is_own(text: str) -> bool:
    """Whether a name on the command line brings its source: `NAME=SOURCE`."""
    return "=" in text


def plain_name(text: str) -> str:
    """The name in `NAME=SOURCE`, or the text itself."""
    return text.partition("=")[0].strip()


def own_set(
    text: str,
    templates: tuple[str, ...] | None = None,
    usual: tuple[str, ...] | None = None,
    options: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> OwnSet:
    """The data set that `NAME=SOURCE` names; its images are read when first used.

    Args:
        text: the notation.
        templates: prompts with one `{}` each, which win over those of the data set.
        usual: prompts where neither these nor the source's option state any; None for those of
            `templates.txt` in the folder, or the default.
        options: further options, see `OPTIONS`.
        folder: relative paths are relative to it; None for the working directory.

    Raises:
        MissingFileError: if its folder or file does not exist.
        UsageError: if the name, the kind of source or an option is invalid.
    """
    name, _, source = (part.strip() for part in text.partition("="))
    check_name("data set", name)
    if not source:
        raise UsageError(
            f"data set {name}: expected a source after {name}=, got nothing; write for instance "
            f"{name}=FOLDER or {name}=FILE.csv"
        )
    kind, place, chosen = _parts(name, source, folder)
    chosen |= dict(options or {})
    for option, value in chosen.items():
        if option not in OPTIONS[kind]:
            raise unknown(f"option of data set {name} (a {kind})", option, OPTIONS[kind])
        each = value if isinstance(value, list | tuple) else [value]
        if option not in CHECKED and any(isinstance(one, bool) for one in each):
            raise UsageError(
                f"data set {name}: expected a text as {option}, got {value!r}: {TRUTH}"
            )
    epochs = _epochs(name, chosen.pop("epochs", None))
    if kind == "suite":
        home, _, inner = place.partition(":")
        suites.SUITES[home].check(inner)
        listed = suites.SUITES[home].task(inner)
        task = Task(epochs or listed.epochs, listed.num_classes)
        return OwnSet(name, task, borrowed=(home, inner))
    own_templates = _templates(name, chosen.pop("templates", None), folder)
    names = _names(name, chosen.pop("classnames", None), folder)
    load = BUILDERS[kind](name, place, names, chosen)
    beside = _beside(Path(place), name) if kind == "folder" else DEFAULT_TEMPLATES
    prompts = templates or own_templates or usual or beside
    return OwnSet(
        name, Task(epochs), RegisteredSet(load, prompts, getattr(load, "classnames", None))
    )


def _parts(name: str, source: str, folder: Path | None) -> tuple[str, str, dict[str, Any]]:
    """The kind of a source, its place and its options."""
    kind, colon, rest = source.partition(":")
    if colon and kind in ("hub", "torchvision", "python"):
        place, options = _with_options(name, rest)
        if not place:
            raise UsageError(f"data set {name}: expected a name after {kind}:, got nothing")
        if kind == "hub" and (local := _path(place, folder)).is_dir():
            place = str(local)
        return kind, place, options
    if colon and kind in suites.SUITES:
        place, options = _with_options(name, source)
        return "suite", place, options
    path = _path(source, folder)
    options = {}
    if not path.exists() and "?" in source:
        source, options = _with_options(name, source)
        path = _path(source, folder)
    if not path.exists():
        _refuse_missing(name, source, path)
    if path.is_dir():
        return "folder", str(path), options
    if path.suffix.lower() in TABLES:
        return "table", str(path), options
    raise UsageError(
        f"data set {name}: expected a folder or a table ({', '.join(TABLES)}), got the file {path}"
    )


def _refuse_missing(name: str, source: str, path: Path) -> None:
    kind, colon, _ = source.partition(":")
    kinds = ("hub", "torchvision", "python", *suites.SUITES)
    if colon and re.fullmatch(r"\w{2,}", kind):
        raise unknown(f"kind of source of data set {name}", kind, kinds)
    raise MissingFileError(
        f"data set {name}: {path} does not exist; expected a folder, a table "
        f"({', '.join(TABLES)}), or {', '.join(f'{kind}:...' for kind in kinds[:3])}"
    )


def _with_options(name: str, text: str) -> tuple[str, dict[str, Any]]:
    place, mark, query = text.partition("?")
    if not mark:
        return place, {}
    try:
        return place, dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))
    except ValueError as error:
        raise UsageError(
            f"data set {name}: expected OPTION=VALUE&OPTION=VALUE after ?, got '{shown(query)}'"
        ) from error


def _path(text: str, folder: Path | None) -> Path:
    path = expanded(text)
    return path if folder is None else folder / path


def _epochs(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and value.isdecimal() and int(value) > 0:
        return int(value)
    raise UsageError(f"data set {name}: expected epochs of at least 1, got {value!r}")


def _templates(name: str, value: Any, folder: Path | None) -> tuple[str, ...] | None:
    from tangent_arithmetic.data.own.words import templates_from

    if value is None:
        return None
    if isinstance(value, str):
        return templates_from(value if "{" in value else str(_path(value, folder)), name)
    return check_templates(name, value)


def _names(name: str, value: Any, folder: Path | None) -> Path | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if (path := _path(value, folder)).is_file():
            return path
        raise MissingFileError(
            f"data set {name}: its file of class names {path} does not exist; expected one name a "
            "line"
        )
    if isinstance(value, list | tuple) and value and all(isinstance(v, str | int) for v in value):
        return tuple(map(str, value))
    raise UsageError(
        f"data set {name}: expected as classnames a file or a list of names, got {value!r}"
    )


def _beside(root: Path, name: str) -> tuple[str, ...]:
    from tangent_arithmetic.data.own.words import templates_beside

    return templates_beside(root, name)


def _folder(name: str, place: str, names: Any, options: Mapping[str, Any]) -> Any:
    from tangent_arithmetic.data.own.folders import FolderSource

    return FolderSource(name, Path(place), names)


def _table(name: str, place: str, names: Any, options: Mapping[str, Any]) -> Any:
    from tangent_arithmetic.data.own.tables import TableSource

    chosen = dict(options)
    multilabel = chosen.pop("multilabel", None)
    if multilabel not in (None, True, False):
        known = {"true": True, "false": False}
        if str(multilabel).lower() not in known:
            raise UsageError(
                f"data set {name}: expected multilabel true or false, got {multilabel!r}"
            )
        multilabel = known[str(multilabel).lower()]
    return TableSource(name, Path(place), _texts(chosen), names, multilabel)


def _hub(name: str, place: str, names: Any, options: Mapping[str, Any]) -> Any:
    from tangent_arithmetic.data.own.hubs import HubSource

    return HubSource(name, place, _texts(options), names)


def _torchvision(name: str, place: str, names: Any, options: Mapping[str, Any]) -> Any:
    from tangent_arithmetic.data.own.torch_sets import TorchvisionSource

    return TorchvisionSource(name, place, names)


def _python(name: str, place: str, names: Any, options: Mapping[str, Any]) -> Any:
    from tangent_arithmetic.data.own.torch_sets import PythonSource

    return PythonSource(name, place, names)


def _texts(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, str(value)) for key, value in options.items()))


BUILDERS: Mapping[str, Callable[..., Callable[[Path], Splits]]] = {
    "folder": _folder,
    "table": _table,
    "hub": _hub,
    "torchvision": _torchvision,
    "python": _python,
}
