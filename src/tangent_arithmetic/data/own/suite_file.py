"""A suite in a YAML file.

    name: mine                        # that of the file if left out
    templates: a photo of a {}.       # a prompt, several, or a file of prompts
    lr: 1e-5                          # and batch_size, warmup_length, epochs, ...: see `KEYS`
    tasks:
      pets: pictures/pets             # a source, see `tangent_arithmetic.data.own`
      birds: {source: birds.csv, label: species, epochs: 12}
    control:                          # optional: negation needs one
      objects: pictures/objects
    related:                          # trained on and evaluated only when named
      digits: embedded:MNIST

Relative paths are relative to the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tangent_arithmetic.data import suites
from tangent_arithmetic.data.own.mixing import empty_suite, with_own
from tangent_arithmetic.data.own.sources import OPTIONS, TRUTH, OwnSet, own_set
from tangent_arithmetic.data.own.words import templates_from
from tangent_arithmetic.data.suites import Suite, check_name, check_templates
from tangent_arithmetic.runtime.errors import UsageError, shown, unknown
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.storage.reading import read_text, readable

Prompts = tuple[tuple[str, ...] | None, tuple[str, ...] | None]  # of the flag, of the file
GROUPS = ("tasks", "control", "related")
KEYS: Mapping[str, tuple[Callable[[Any], Any], float, float]] = {  # type, least, most
    "lr": (float, 0, 1e3),
    "batch_size": (int, 1, 2**20),
    "num_grad_accumulation": (int, 1, 2**16),
    "warmup_length": (int, 0, 10**9),
    "steps": (int, 1, 10**9),
    "epochs": (int, 1, 10**6),
    "num_workers": (int, 0, 1024),
}
ALL_KEYS = ("name", "templates", *KEYS, *GROUPS)


def read_suite(path: str | Path, like: Suite, templates: tuple[str, ...] | None = None) -> Suite:
    """The suite in a file.

    Args:
        path: the file.
        like: the suite whose recipe holds for what the file does not state.
        templates: prompts that win over those of the file.

    Raises:
        MissingFileError: if the file, or a data set in it, does not exist.
        UsageError: if the file is not valid; the message names the key.
    """
    path = expanded(path)
    content = _parsed(path)
    for key in content:
        if key not in ALL_KEYS:
            raise unknown(f"key in {path}", str(key), ALL_KEYS)
    name = str(content.get("name", path.stem))
    check_name(f"suite name in {path}", name)
    if name in suites.SUITES:
        raise UsageError(f"{path}: there is another suite {name}; write another one after name:")
    prompts = (templates, _templates(path, content))
    values = {key: _number(path, key, content[key]) for key in KEYS if key in content}
    suite = _with_recipe(empty_suite(like, name), values)
    for group in GROUPS:
        own = _group(path, group, content.get(group), prompts, values.get("epochs"))
        if group == "control" and len(own) > 1:
            raise UsageError(
                f"{path}: control must be one data set, got {', '.join(each.name for each in own)}"
            )
        suite = with_own(suite, own, [each.name for each in own if group == "tasks"])
        if group == "control" and own:
            suite = replace(suite, control=own[0].name)
    if not suite.tasks:
        raise UsageError(f"{path} has no tasks; add\ntasks:\n  NAME: SOURCE")
    return suite


def _parsed(path: Path) -> dict[str, Any]:
    import yaml

    text = read_text(path, "the YAML file of a suite")
    with readable(path, "the YAML file of a suite"):
        _refuse_repeated(path, yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected keys such as tasks:, got a {type(content).__name__}; "
            "`tangent-arithmetic suite init` writes a suite"
        )
    return content


def _refuse_repeated(path: Path, node: Any) -> None:
    """Refuses a key that is there twice, of which YAML would keep the last."""
    if isinstance(getattr(node, "value", None), list):
        pairs = [each for each in node.value if isinstance(each, tuple)]
        keys = [key.value for key, _ in pairs if isinstance(key.value, str)]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            line = node.start_mark.line + 1
            raise UsageError(f"{path}: {shown(twice)} is twice in the group of line {line}")
        for each in node.value:
            _refuse_repeated(path, each[1] if isinstance(each, tuple) else each)


def _templates(path: Path, content: Mapping[str, Any]) -> tuple[str, ...] | None:
    value = content.get("templates")
    if value is None:
        return None
    if isinstance(value, str):
        text = value if "{" in value else str(path.parent / expanded(value))
        return templates_from(text, f"of {path}")
    return check_templates(f"of {path}", value)


def _number(path: Path, key: str, value: Any) -> Any:
    kind, least, most = KEYS[key]
    try:
        number = kind(value)  # YAML reads 1e-5 as a text
        valid = not isinstance(value, bool) and least <= number <= most and number == float(value)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        what = "an integer" if kind is int else "a number"
        raise UsageError(
            f"{path}: {key} is {shown(repr(value))}, expected {what} from {least:g} to {most:g}"
        )
    return number


def _with_recipe(suite: Suite, values: Mapping[str, Any]) -> Suite:
    by_model = ("batch_size", "num_grad_accumulation")
    changes = {key: value for key, value in values.items() if key != "epochs"}
    changes |= {key: {"": values[key]} for key in by_model if key in values}
    if "batch_size" in values and "num_grad_accumulation" not in values:
        changes["num_grad_accumulation"] = {"": 1}
    if "warmup_length" in values:  # as it is
        changes["warmup_share"] = 1.0
    return replace(suite, **changes)


def _group(
    path: Path, group: str, value: Any, templates: Prompts, epochs: int | None
) -> list[OwnSet]:
    """The data sets in a group of the file."""
    if value is None:
        return []
    if not isinstance(value, dict):
        raise UsageError(
            f"{path}: {group} must map names to sources, as in\n{group}:\n  NAME: SOURCE\ngot "
            f"{shown(repr(value))}"
        )
    if flags := [name for name in value if isinstance(name, bool)]:
        raise UsageError(f"{path}: expected names as keys of {group}, got {flags[0]}: {TRUTH}")
    return [
        _entry(path, f"{group}.{name}", str(name), entry, templates, epochs)
        for name, entry in value.items()
    ]


def _entry(
    path: Path, where: str, name: str, entry: Any, templates: Prompts, epochs: int | None
) -> OwnSet:
    options = {"source": entry} if isinstance(entry, str) else entry
    if not isinstance(options, dict) or not isinstance(options.get("source"), str):
        known = sorted({"source", *(option for kind in OPTIONS.values() for option in kind)})
        raise UsageError(
            f"{path}: {where} must be a source, or have the key source and perhaps others "
            f"({', '.join(known)}); got {shown(repr(entry))}"
        )
    chosen = {str(key): value for key, value in options.items() if key != "source"}
    if epochs is not None:
        chosen.setdefault("epochs", epochs)
    try:
        return own_set(f"{name}={options['source']}", *templates, chosen, path.parent)
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from error
