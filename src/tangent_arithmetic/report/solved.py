"""Solved coefficients, of the files that `combine` writes: their sums, and maps of their values."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tangent_arithmetic.report.certified import mode_of
from tangent_arithmetic.report.shades import shade
from tangent_arithmetic.report.table import Line, Table
from tangent_arithmetic.run.modes import Mode, in_order
from tangent_arithmetic.run.present import superseded
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.reading import read_json

logger = logging.getLogger(__name__)

KIND = "combined_"  # before the grouping, in the name of a file
MAPPED = "task-layer"  # the grouping whose coefficients are shown as a map


@dataclass(frozen=True)
class Solved:
    """A sum of task vectors with solved coefficients.

    Attributes:
        mode: of the task vectors.
        name: what has a coefficient of its own, and what was solved on: "task-layer, 4-shot".
        coefficients: by name of the direction: TASK, GROUP or TASK/GROUP.
        uniform: the best coefficient for all of them; None if not known.
        test: the main metric of each task.
        some: the tasks, where they are not all of the suite's: "A+B"; else nothing.
        earlier: whether it is of earlier checkpoints than the single tasks.
    """

    mode: Mode
    name: str
    coefficients: dict[str, float]
    uniform: float | None
    test: dict[str, float]
    some: str = ""
    earlier: bool = False

    @property
    def mapped(self) -> bool:
        """Whether each task has a coefficient in each layer."""
        return self.name.split(", ")[0] == MAPPED


def solved_of(folder: Path) -> list[Solved]:
    """The solved sums in a run's folder, by mode and name; damaged files are left out."""
    found = [one for path in folder.glob(f"*{KIND}*.json") if (one := _read(path)) is not None]
    order = in_order(one.mode.name for one in found)
    return sorted(found, key=lambda one: (order.index(one.mode.name), one.name))


def _read(path: Path) -> Solved | None:
    try:
        results = read_json(path)
    except (MissingFileError, UsageError) as error:
        logger.warning("%s is left out: %s", path, error)
        return None
    mode, test = mode_of(results), results.get("test")
    solved = numbers(test.get("solved") if isinstance(test, dict) else None)
    coefficients = numbers(results.get("coefficients"))
    if mode is None or not solved or not coefficients:
        return None
    uniform = numbers({"uniform": results.get("uniform")}).get("uniform")
    slug, _, some = path.stem.partition(KIND)[2].partition("_tasks")
    earlier = superseded(path.parent, results["provenance"], mode.name)
    return Solved(mode, _name(slug), coefficients, uniform, solved, some, earlier)


def _name(slug: str) -> str:
    """The part of a file's name after `KIND`, to be read: "task_4shot" is "task, 4-shot"."""
    flags = r"((?:_(?:ridge|bounds|solver)[^_]*)*)"
    found = re.fullmatch(r"(.*?)(?:_(\d+)shot)?(?:_(entropy|selflabel))?" + flags, slug, re.DOTALL)
    assert found is not None
    grouping, shots, rule, more = found.groups()
    parts = [grouping, *([f"{shots}-shot"] if shots else []), *([rule] if rule else [])]
    more = re.sub(r"_(ridge|bounds|solver)", r", \1 ", more)
    return ", ".join(parts) + more


def numbers(values: object) -> dict[str, float]:
    """The finite numbers of a JSON object, by key."""
    return {
        str(key): float(value)
        for key, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def heat_maps(found: Sequence[Solved]) -> list[Table]:
    """A map of tasks and layers for each sum that has a coefficient for each of them.

    Sums of earlier checkpoints than the single tasks have none.
    """
    return [_map(one) for one in found if one.mapped and not one.earlier]


def _map(one: Solved) -> Table:
    square: dict[str, dict[str, float]] = {}
    for name, value in one.coefficients.items():
        task, _, layer = name.partition("/")
        square.setdefault(task, {})[layer] = value
    layers = list(dict.fromkeys(layer for row in square.values() for layer in row))
    most = max(map(abs, one.coefficients.values())) or 1.0
    further = one.name.removeprefix(MAPPED) + (f", {one.some}" if one.some else "")
    return Table(
        f"coefficients-{one.mode.name}{further}".replace("+", "-").replace(", ", "-"),
        f"Solved coefficients, {one.mode.label}{further}: which layer of which task got what",
        layers,
        lines=[_row(task, row, layers, most) for task, row in square.items()],
        corner="coefficient",
        about=[_said(one, most)],
    )


def _row(task: str, row: Mapping[str, float], layers: Sequence[str], most: float) -> Line:
    """The coefficients of a task; a task without parameters in a layer has none there."""
    cells = [f"{round(row[layer], 2) + 0.0:.2f}" if layer in row else "" for layer in layers]
    styles = tuple(shade(row[layer] / most) if layer in row else "" for layer in layers)
    return Line(task, cells, styles=styles)


def _said(one: Solved, most: float) -> str:
    uniform = "" if one.uniform is None else f"; one coefficient for all: {one.uniform:g}"
    return (
        f"{len(one.coefficients)} coefficients, solved on validation examples{uniform}. Colours go "
        f"from -{most:.2f}, purple, over 0, white, to {most:.2f}, green."
    )
