"""A first suite file for folders and tables: names, epochs by the papers' rule, a control set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.own.budget import Budget, budget
from tangent_arithmetic.data.own.sources import is_own, own_set, plain_name
from tangent_arithmetic.data.registry import get_dataset
from tangent_arithmetic.data.suites import OWN_SUITE, Suite
from tangent_arithmetic.runtime.errors import UsageError

HEADER = """\
# A suite of tasks for --suite. Relative paths are relative to this file.
# Keys: name, templates, lr, batch_size, num_grad_accumulation, warmup_length, steps, epochs,
# num_workers, tasks, control, related; of a data set: source, epochs, classnames, templates, and
# for tables and the hub the columns image and label.
"""
NO_CONTROL = """\
# No control set: negation (`tangent-arithmetic negate`) needs one, all else does not.
# control:
#   objects: FOLDER
"""


@dataclass(frozen=True)
class Draft:
    """One data set of the file.

    Attributes:
        name: as flags will spell it.
        source: as the file spells it.
        classes: number of classes.
        tests: number of test images.
        budget: how long it is trained on.
    """

    name: str
    source: str
    classes: int
    tests: int
    budget: Budget

    def __str__(self) -> str:
        plural = "" if self.classes == 1 else "es"
        return f"{self.classes:,} class{plural}, {self.tests:,} test images, {self.budget}"


def name_for(source: str) -> str:
    """A data set's name from its source: the name of its folder, file or class."""
    place = re.split(r"[?]", source)[0].rstrip("/\\")
    last = re.split(r"[/\\:]", place)[-1]
    stem = re.sub(r"\.(csv|tsv|parquet|jsonl)$", "", last, flags=re.IGNORECASE)
    name = re.sub(r"[^\w-]+", "_", stem).strip("_")
    return name[: -len("Val")] if name.endswith("Val") and name != "Val" else name


def named_source(text: str) -> str:
    """A source as NAME=SOURCE, with a name of its own if none is given."""
    if is_own(text.partition("?")[0]) and not Path(text).exists():
        return text
    if not (name := name_for(text)):
        raise UsageError(f"no name follows from {text}; write NAME={text}")
    return f"{name}={text}"


def draft(text: str, like: Suite, file: Path, location: Path) -> Draft:
    """One data set of the file; its images are listed, its source is made relative to the file.

    Args:
        text: NAME=SOURCE.
        like: the suite whose recipe holds.
        file: the file to be written.
        location: the data root.

    Raises:
        UsageError: if the data set cannot be read.
    """
    from tangent_arithmetic.data.own.mixing import empty_suite, with_own

    own = own_set(text)
    suite = with_own(empty_suite(like, OWN_SUITE), [own], [own.name])
    whole = get_dataset(own.name, None, location, suite=suite)
    training = get_dataset(f"{own.name}Val", None, location, suite=suite).train
    step_size = suite.batch_size[""] * suite.num_grad_accumulation[""]
    planned = budget(len(training), step_size, suite)
    source = text.partition("=")[2]
    return Draft(own.name, _relative(source, file), len(whole.classnames), len(whole.test), planned)


def _relative(source: str, file: Path) -> str:
    """A path relative to the file's folder if it lies in it, absolute otherwise."""
    place, mark, query = source.partition("?")
    path = Path(place).expanduser()
    if not path.exists():  # of the hub, torchvision or Python
        return source
    folder = file.parent.resolve()
    absolute = path.resolve()
    inside = absolute.is_relative_to(folder)
    text = absolute.relative_to(folder).as_posix() if inside else str(absolute)
    return f"{text}{mark}{query}"


def written(
    name: str, tasks: Sequence[Draft], control: Draft | None, like: Suite, model: str
) -> str:
    """The text of the file.

    Args:
        name: of the suite.
        tasks: its tasks.
        control: its control set, if any.
        like: the suite whose recipe holds.
        model: the model for which it was chosen.
    """
    recipe = {"lr": like.lr, "batch_size": like.batch_size[""], "steps": like.steps}
    lines = [HEADER, f"name: {_scalar(name)}", "# templates: a photo of a {}."]
    lines += [f"# recipe for {model}: about {like.steps:,} steps for a task whose epochs are not"]
    lines += ["# stated; warm-up is a tenth of the steps of each task"]
    lines += [f"{key}: {_scalar(value)}" for key, value in recipe.items()]
    lines += ["tasks:", *(line for each in tasks for line in _entry(each, "  "))]
    if control is None:
        return "\n".join([*lines, NO_CONTROL])
    return "\n".join([*lines, "control:", *_entry(control, "  "), ""])


def _entry(each: Draft, indent: str) -> list[str]:
    return [
        f"{indent}{_scalar(each.name)}:  # {each}",
        f"{indent}  source: {_scalar(each.source)}",
        f"{indent}  epochs: {each.budget.epochs}",
    ]


def _scalar(value: Any) -> str:
    """A value on one line of YAML."""
    import yaml

    text: str = yaml.safe_dump(value, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def check_distinct(texts: Sequence[str]) -> None:
    """Refuses two data sets of one name.

    Raises:
        UsageError: if there are; the message says how to give another name.
    """
    names = [plain_name(text) for text in texts]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        sources = [text.partition("=")[2] for text in texts if plain_name(text) == twice]
        raise UsageError(
            f"two data sets would be called {twice}, {' and '.join(sources)}; name one of them as "
            f"in OTHER={sources[-1]}"
        )
