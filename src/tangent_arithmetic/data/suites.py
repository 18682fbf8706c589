"""Suites of tasks, and the registration of further suites and data sets.

A data set of your own is one call:

    register_dataset("Cats", load, ("a photo of a {}.",), suite="clip8", task=Task(5, 12))

where `load(data_root)` returns `tangent_arithmetic.data.base.Splits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tangent_arithmetic.runtime.errors import UsageError, unknown
from tangent_arithmetic.runtime.registry import Registry

if TYPE_CHECKING:
    from tangent_arithmetic.data.base import Splits

DEFAULT_CACHE = Path("~/.cache/tangent-arithmetic")
EMBEDDED_MODEL = "ViT-Nano-8"
BUILT_IN = ("clip8", "embedded")


@dataclass(frozen=True)
class Task:
    """Number of fine-tuning epochs and of classes."""

    epochs: int
    num_classes: int


@dataclass(frozen=True)
class Suite:
    """A set of tasks that share a control set and a fine-tuning recipe.

    The default recipe is that of the papers.

    Attributes:
        name: as `--suite` spells it.
        tasks: name -> task, in the order of tables and sums.
        control: the data set whose accuracy negation must preserve.
        lr: peak learning rate.
        warmup_length: optimizer steps of linear warm-up.
        batch_size: images per micro-step, over all processes, by model ("": any other model).
        num_grad_accumulation: micro-steps per optimizer step, by model likewise.
        num_workers: data-loading processes per process; None for one per core.
        related: further data sets, trained on and evaluated only when named.
    """

    name: str
    tasks: Mapping[str, Task]
    control: str
    lr: float = 1e-5
    warmup_length: int = 500
    batch_size: Mapping[str, int] = field(default_factory=lambda: {"": 128})
    num_grad_accumulation: Mapping[str, int] = field(default_factory=lambda: {"": 1})
    num_workers: int | None = None
    related: Mapping[str, Task] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All data sets of the suite."""
        return (*self.tasks, self.control, *self.related)

    def check(self, name: str) -> str:
        """Returns `name` if the suite has this data set (or its Val split).

        Raises:
            UsageError: otherwise; the message lists the choices, nearest first.
        """
        if name.removesuffix("Val") in self.names:
            return name
        raise unknown(f"data set of suite {self.name}", name, self.names)


@dataclass(frozen=True)
class RegisteredSet:
    """A registered data set, see `register_dataset`."""

    load: Callable[[Path], Splits]
    templates: tuple[str, ...]


SUITES: Registry[Suite] = Registry("suite")
DATASETS: dict[tuple[str, str], RegisteredSet] = {}  # keys (suite, name)


def get_suite(name: str) -> Suite:
    """The suite of this name; an unknown one raises a `UsageError` with the choices."""
    return SUITES[name]


def register_suite(suite: Suite) -> None:
    """Adds a suite, to be chosen with `--suite`; its data sets are registered one by one.

    Raises:
        UsageError: if the name is taken or invalid.
    """
    _check_name("suite", suite.name)
    SUITES.add(suite.name, suite)


def register_dataset(
    name: str,
    load: Callable[[Path], Splits],
    templates: Sequence[str],
    suite: str,
    task: Task | None = None,
) -> None:
    """Adds a data set to a suite; every command then knows it by name.

    Args:
        name: as flags spell it; `nameVal` is its validation split.
        load: reads its splits; the argument is the data root (`--data-location`).
        templates: prompts with one `{}` for the class name.
        suite: the suite to extend.
        task: its epochs and classes; None if the suite already lists them.

    Raises:
        UsageError: if the suite is unknown, the name taken or invalid, a template invalid, or
            `task` missing.
    """
    entry, kind = get_suite(suite), f"data set of suite {suite}"
    listed = name in entry.names
    if (suite, name) in DATASETS or (listed and suite in BUILT_IN):
        raise UsageError(f"{kind} {name!r} is already registered; choose another name")
    _check_name(kind, name)
    if isinstance(templates, str) or not templates or any(t.count("{}") != 1 for t in templates):
        raise UsageError(
            f"data set {name}: expected templates with one {{}} each, got {templates!r}; write for "
            "instance ('a photo of a {}.',)"
        )
    if not listed:
        if task is None:
            raise UsageError(
                f"suite {suite} does not list {name}; add task=Task(epochs, num_classes)"
            )
        SUITES[suite] = replace(entry, related={**entry.related, name: task})
    DATASETS[suite, name] = RegisteredSet(load, tuple(templates))


def _check_name(kind: str, name: str) -> None:
    if not re.fullmatch(r"[\w-]+", name) or name.endswith("Val"):
        raise UsageError(
            f"invalid {kind} {name!r}: expected letters, digits, _ and -, not ending in Val"
        )


def suite_of_model(model: str) -> str:
    """The default suite of a model."""
    return "embedded" if model.partition("__")[0] == EMBEDDED_MODEL else "clip8"


# epochs: interfaces of the public projects; about 2,000 steps of 128 each
register_suite(
    Suite(
        "clip8",
        tasks={
            "Cars": Task(35, 196),
            "DTD": Task(76, 47),
            "EuroSAT": Task(12, 10),
            "GTSRB": Task(11, 43),
            "MNIST": Task(5, 10),
            "RESISC45": Task(15, 45),
            "SUN397": Task(14, 397),
            "SVHN": Task(4, 10),
        },
        control="ImageNet",
        batch_size={"": 128, "ViT-L-14": 64},
        num_grad_accumulation={"": 1, "ViT-L-14": 2},
        # not among the papers' eight; also about 2,000 steps each
        related={"CIFAR10": Task(6, 10), "CIFAR100": Task(6, 100), "STL10": Task(60, 10)},
    )
)
# epochs: 50 to 75 steps of 64 each
register_suite(
    Suite(
        "embedded",
        tasks={
            "Emoji": Task(5, 9),
            "FashionMNIST": Task(1, 10),
            "LandCover": Task(1, 8),
            "Letters": Task(1, 26),
            "MNIST": Task(1, 10),
            "Signs": Task(1, 20),
            "StreetDigits": Task(1, 10),
            "Textures": Task(1, 16),
        },
        control="Shapes",
        lr=3e-4,
        warmup_length=8,
        batch_size={"": 64},
        num_workers=0,
        # with StreetDigits and Letters: two styles times two label sets, for analogies
        related={"Digits": Task(1, 10), "StreetLetters": Task(1, 26)},
    )
)
