"""The modes: how weights are fine-tuned, edited and evaluated. One `Mode` each, in one table.

A mode of your own is registered once, before the command line is parsed:

    register_mode(Mode("mine", label="my mode", prefix="mine_", colour="#009e73", marker="D"))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.registry import Registry

if TYPE_CHECKING:
    from tangent_arithmetic.arithmetic.task_vectors import TaskVector


@dataclass(frozen=True)
class Mode:
    """How a model's weights are fine-tuned, edited and evaluated.

    Attributes:
        name: value of `--finetuning-mode`.
        label: name in tables and figures.
        prefix: of result files, `{prefix}ft_accuracies.json` and so on.
        colour: in figures.
        marker: in figures, as matplotlib names it.
        linear: whether the edited model is the linearisation at theta0.
        trained_by: the mode whose fine-tuned checkpoints it uses; None for this mode's.
        edits: whether there are task vectors in this mode; false for zero-shot evaluation.
    """

    name: str
    label: str
    prefix: str
    colour: str
    marker: str
    linear: bool = False
    trained_by: str | None = None
    edits: bool = True

    @property
    def training(self) -> Mode:
        """The mode that fine-tunes for this one."""
        return self if self.trained_by is None else MODES[self.trained_by]

    @property
    def checkpoint(self) -> str:
        """The name of a fine-tuned checkpoint, without its ending."""
        return f"{self.training.prefix}finetuned"

    @property
    def accuracies(self) -> str:
        """The name of the file of single-task accuracies, without its ending."""
        return f"{self.prefix}{'ft_' if self.edits else ''}accuracies"

    @property
    def task_vector(self) -> type[TaskVector]:
        """The class of its task vectors: the kind of its checkpoints."""
        from tangent_arithmetic.arithmetic.task_vectors import (
            LinearizedTaskVector,
            NonLinearTaskVector,
        )

        return LinearizedTaskVector if self.training.linear else NonLinearTaskVector


MODES: Registry[Mode] = Registry("fine-tuning mode")  # in the order of tables and figures


def register_mode(mode: Mode) -> Mode:
    """Adds a mode to the table.

    Raises:
        UsageError: if its name or prefix is taken.
    """
    for other in MODES.values():
        if mode.prefix == other.prefix and mode.name != other.name:
            raise UsageError(
                f"mode {mode.name!r} has the prefix {mode.prefix!r} of mode {other.name!r}; choose "
                "another prefix"
            )
    return MODES.add(mode.name, mode)


ZEROSHOT = register_mode(
    Mode("none", "zero-shot", "zeroshot_", colour="#666666", marker="o", edits=False)
)
STANDARD = register_mode(Mode("standard", "standard", "", colour="#d55e00", marker="s"))
LINEAR = register_mode(
    Mode("linear", "linear", "linear_", colour="#0072b2", marker="o", linear=True)
)
POSTHOC = register_mode(
    Mode(
        "posthoc", "post-hoc", "posthoc_", "#e69f00", marker="^", linear=True, trained_by="standard"
    )
)


def trained() -> list[str]:
    """Modes that are fine-tuned."""
    return [mode.name for mode in MODES.values() if mode.edits and mode.trained_by is None]


def edited() -> list[str]:
    """Modes that have task vectors."""
    return [mode.name for mode in MODES.values() if mode.edits]


def linear() -> list[str]:
    """Modes whose edited model is a linearisation."""
    return [mode.name for mode in MODES.values() if mode.linear]


def in_order(names: Iterable[str]) -> list[str]:
    """These modes, each once, in the order of the table."""
    present = set(names)
    return [name for name in MODES if name in present]


def get_mode(name: str) -> Mode:
    """The mode of this name; an unknown one raises a `UsageError` with the choices."""
    return MODES[name]


def require_mode(name: str | None, script: str, modes: list[str]) -> Mode:
    """The fine-tuning mode of a command.

    Args:
        name: the mode's name, or None.
        script: the command, for messages.
        modes: names of the modes that it supports.

    Raises:
        UsageError: if the name is missing or not one of `modes`.
    """
    choices = ", ".join(f"--finetuning-mode={m}" for m in modes)
    if name is None:
        raise UsageError(f"{script} needs a fine-tuning mode; choose {choices}")
    if name not in modes:
        raise UsageError(f"{script} has no fine-tuning mode {name!r}; choose {choices}")
    return MODES[name]
