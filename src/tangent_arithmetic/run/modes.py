"""The modes: how weights are fine-tuned, edited and evaluated. One `Mode` each, in one table.

A mode of your own is registered once, before the command line is parsed:

    register_mode(Mode("mine", label="my mode", prefix="mine_", colour="#009e73", marker="D"))

Names with `+` need no registration: `linear+taujp` is linear fine-tuning with the objective τJp,
`linear+attention` trains the attention alone, `linear+taujp+attention` is both. They are what
`--objective` and `--trainable` turn a mode into.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tangent_arithmetic.runtime.errors import UsageError, unknown
from tangent_arithmetic.runtime.registry import Registry

if TYPE_CHECKING:
    from tangent_arithmetic.arithmetic.task_vectors import TaskVector

SUPERVISED, ALL = "supervised", "all"  # the objective and the trainable parameters of the papers
MARKERS = "DvPX*<>pdh"
COLOURS = ("#cc79a7", "#7f3c8d", "#8c564b", "#11696b", "#56b4e9", "#a5aa00", "#c2185b")
OBJECTIVES = {  # name -> label, and whether only linear models have it
    SUPERVISED: ("", False),
    "taujp": ("\u03c4Jp", True),
    "tak": ("TAK", True),
    "orthoreg": ("OrthoReg", False),
    "delta": ("DELTA", False),
    "ascent": ("ascent", False),
}
BASELINES = ("ascent",)  # objectives whose vectors are compared with negated ones alone
OF_STANDARD = ("delta",)  # objectives that only standard models have


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
        objective: what is minimised, a key of `OBJECTIVES`.
        trainable: which parameters are trained, see `training.trainable`.
    """

    name: str
    label: str
    prefix: str
    colour: str
    marker: str
    linear: bool = False
    trained_by: str | None = None
    edits: bool = True
    objective: str = SUPERVISED
    trainable: str = ALL

    @property
    def training(self) -> Mode:
        """The mode that fine-tunes for this one."""
        return self if self.trained_by is None else MODES[self.trained_by]

    @property
    def method(self) -> tuple[bool, str, str]:
        """What decides the weights that it trains: linear or not, objective, trained parameters."""
        return self.linear, self.objective, self.trainable

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


class Modes(Registry[Mode]):
    """The modes by name; those composed with `+` are looked up, but are no rows of the table."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.composed: dict[str, Mode] = {}

    def __missing__(self, name: str) -> Mode:
        if name in self.composed:
            return self.composed[name]
        first, *rest = str(name).split("+")
        if not rest or not all(rest) or first not in self:
            return super().__missing__(name)
        objective = rest.pop(0) if rest[0] in OBJECTIVES else SUPERVISED
        return variant(self[first], objective, "+".join(rest) or ALL)


MODES = Modes("fine-tuning mode")  # in the order of tables and figures


def register_mode(mode: Mode) -> Mode:
    """Adds a mode to the table.

    Raises:
        UsageError: if its name or prefix is taken.
    """
    _check_prefix(mode)
    return MODES.add(mode.name, mode)


def _check_prefix(mode: Mode) -> None:
    for other in (*MODES.values(), *MODES.composed.values()):
        if mode.prefix == other.prefix and mode.name != other.name:
            raise UsageError(
                f"mode {mode.name!r} has the prefix {mode.prefix!r} of mode {other.name!r}; choose "
                "another prefix"
            )


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


def variant(mode: Mode, objective: str = SUPERVISED, trainable: str = ALL) -> Mode:
    """The mode that trains like `mode`, with this objective and these parameters.

    Args:
        mode: the mode; what it sets itself stays unless it is set here.
        objective: a key of `OBJECTIVES`.
        trainable: which parameters are trained, see `training.trainable`.

    Raises:
        UsageError: for an unknown objective, one that needs a linear model, or a mode that is not
            trained.
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    objective = mode.objective if objective == SUPERVISED else objective
    trainable = mode.trainable if trainable == ALL else trainable
    if (objective, trainable) == (mode.objective, mode.trainable):
        return mode
    label, needs_linear = OBJECTIVES[objective]
    if mode.trained_by is not None or not mode.edits:
        raise UsageError(f"mode {mode.name} is not trained; --objective and --trainable need one")
    if needs_linear and not mode.linear:
        raise UsageError(
            f"objective {objective} penalises the tangent of a linear model; choose "
            "--finetuning-mode=linear"
        )
    if objective in OF_STANDARD and mode.linear:
        raise UsageError(
            f"objective {objective} distils a linear model into a standard one; choose "
            "--finetuning-mode=standard"
        )
    wanted = replace(mode, objective=objective, trainable=trainable)
    for other in (*MODES.values(), *MODES.composed.values()):
        if other.edits and other.trained_by is None and other.method == wanted.method:
            return other
    base = next(m for m in MODES.values() if m.linear == mode.linear and m.edits)
    parts = [part for part in (objective, trainable) if part not in (SUPERVISED, ALL)]
    number = zlib.crc32("+".join(parts).encode())
    name = "+".join([base.name, *parts])
    names = [label if part == objective else part for part in parts]
    slug = re.sub(r"\W+", "-", "_".join(parts))
    if slug != "_".join(parts) or len(slug) > 60:  # a regular expression: told apart by its hash
        slug = f"{slug[:40]}-{number:08x}"
    prefix = f"{base.prefix or 'standard_'}{slug}_"
    composed = replace(
        wanted,
        name=name,
        label=", ".join([base.label, *names]),
        prefix=prefix,
        colour=_colour(objective, number),
        marker=MARKERS[number % len(MARKERS)],
    )
    _check_prefix(composed)
    MODES.composed[name] = composed
    return composed


def _colour(objective: str, number: int) -> str:
    """An objective's own colour; one of the others for a selection of parameters alone."""
    own = len(OBJECTIVES) - 1
    place = list(OBJECTIVES).index(objective) - 1
    return COLOURS[(place if place >= 0 else own + number % (len(COLOURS) - own)) % len(COLOURS)]


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
    """These modes, each once, in the order of the table, then composed ones by name."""
    present = set(names)
    return [
        *(name for name in MODES if name in present),
        *sorted(name for name in present - MODES.keys() if "+" in name),
    ]


def distinct(names: Iterable[str]) -> list[Mode]:
    """These modes in order, with looks for one figure: no two composed ones share a colour.

    Where colours run out, pairs of colour and marker still differ.
    """
    chosen: list[Mode] = []
    for mode in map(get_mode, in_order(names)):
        if mode.name in MODES:
            chosen.append(mode)
            continue
        colours = [mode.colour, *COLOURS]
        looks = [(colour, mode.marker) for colour in colours]
        looks += [(colour, marker) for marker in MARKERS for colour in colours]
        taken = {other.colour for other in chosen}
        pairs = {(other.colour, other.marker) for other in chosen}
        free = [look for look in looks if look[0] not in taken] or [
            look for look in looks if look not in pairs
        ]
        colour, marker = (free or looks)[0]
        chosen.append(replace(mode, colour=colour, marker=marker))
    return chosen


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
    base = name.partition("+")[0]
    if base not in modes:
        raise UsageError(f"{script} has no fine-tuning mode {name!r}; choose {choices}")
    return MODES[name]
