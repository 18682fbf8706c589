"""Fronts of pairs and triples of tasks: what is given up on one for another.

Coefficients are solved on the validation splits for each weight of the tasks, and accuracies are of
the test splits; see `arithmetic/fronts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from tangent_arithmetic.analysis.disentanglement import pairs_of
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import in_paper, panels
from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.arithmetic.fronts import Front, front, simplex
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.run.modes import MODES, Mode, distinct, linear
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

DIVISIONS = {2: 20, 3: 6}  # of the weights, by the number of tasks; 2 for more tasks
START = 0.3  # the coefficient to start from
HEIGHT = np.sqrt(3) / 2  # of a triangle whose sides are 1
COLUMNS = 3  # of panels


def sets_of(run: Run) -> list[tuple[str, ...]]:
    """The pairs of tasks, see `disentanglement.pairs_of`, and the first triple."""
    triples = [tuple(run.tasks[:3])] if len(run.tasks) >= 3 else []
    return [*pairs_of(run), *triples]


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """The fronts of linear modes: a row a task of a point.

    Returns:
        Columns "mode", "tasks" (such as "A+B"), "point", "task", "weight", "coefficient" (of the
        task's own vector), "loss" on validation, "accuracy" on test.

    Raises:
        UsageError: if no mode is linear, or for invalid pairs.
    """
    chosen = [mode for mode in modes if MODES[mode].linear]
    if not chosen:
        raise UsageError(
            f"fronts are solved for linear models, got {', '.join(modes)}; choose from "
            f"{', '.join(f'--finetuning-mode={mode}' for mode in linear())}"
        )
    rows = []
    for mode in chosen:
        for tasks in sets_of(run):
            found = front_of(Edits(run, mode, tasks))
            parts = found.weights, found.coefficients, found.losses, found.accuracies
            for point, columns in enumerate(zip(*parts, strict=True)):
                for task, *values in zip(tasks, *columns, strict=True):
                    rows.append([mode, "+".join(tasks), point, task, *map(float, values)])
    names = ["mode", "tasks", "point", "task", "weight", "coefficient", "loss", "accuracy"]
    return pd.DataFrame(rows, columns=names)


def front_of(edits: Edits) -> Front:
    """The front of the tasks whose vectors are edited, over all ranks."""
    tasks = list(edits.vectors)
    weights = simplex(len(tasks), DIVISIONS.get(len(tasks), 2))
    val, test = ([reduced(edits, f"{task}{end}") for task in tasks] for end in ("Val", ""))
    return front(val, weights, np.full(len(tasks), START), test)


def reduced(edits: Edits, name: str) -> Reduced:
    """What determines the logits of a split, from its kept features, over all ranks."""
    split, base = edits.split(name), edits.base
    assert is_linear(base) and isinstance(split.head, ClassificationHead)
    taus = list(edits.vectors.values())
    own = linear_features(base, taus, split.batches, split.compute, split.cache)
    shares = [each for each in ddp.gather(own) if len(each.labels)]
    columns = zip(*((each.f0, *each.directions) for each in shares), strict=True)
    wide = torch.stack([torch.cat(column) for column in columns])  # (1+K, images, features)
    weight, bias = split.head.weight.detach().cpu(), split.head.bias.detach().cpu()
    base_logits, *steps = wide @ weight.T
    return Reduced(
        name,
        base_logits,
        torch.stack(steps),
        wide.permute(1, 2, 0) if split.head.normalize else None,
        torch.cat([each.labels for each in shares]),
        bias if bool(bias.any()) else None,
    )


def draw(found: pd.DataFrame, run: Run) -> Any:
    """A panel a set of tasks: for two tasks the front, for three a triangle of weights."""
    sets = list(dict.fromkeys(found["tasks"]))
    modes = distinct(found["mode"])
    pairs = [name for name in sets if name.count("+") == 1]
    triples = [(name, mode) for name in sets if name.count("+") == 2 for mode in modes]
    figure, axes = _grid(len(pairs) + len(triples))
    for axis, name in zip(axes, pairs, strict=False):
        _pair(axis, found[found["tasks"] == name], name.split("+"), modes)
    for axis, (name, mode) in zip(axes[len(pairs) :], triples, strict=True):
        own = found[found["tasks"] == name]
        _triangle(figure, axis, own, name.split("+"), mode)
    return figure


def _grid(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels: `COLUMNS` to a row, in a paper two."""
    columns = count if in_paper() else min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure, axes = panels(rows, columns, width=3.2, height=3.2)
    flat = [axis for row in axes for axis in row]
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def _pair(axis: Any, found: pd.DataFrame, tasks: Sequence[str], modes: Sequence[Mode]) -> None:
    """The front of two tasks, a line a mode."""
    for mode in modes:
        own = found[found["mode"] == mode.name]
        if own.empty:
            continue
        first, second = (100 * own[own["task"] == t]["accuracy"].to_numpy() for t in tasks)
        style = {"color": mode.colour, "marker": mode.marker, "label": mode.label}
        axis.plot(first, second, ms=3, **style)
    axis.set(xlabel=f"{tasks[0]}, test, %", ylabel=f"{tasks[1]}, test, %")
    axis.legend()


def _triangle(
    figure: Any, axis: Any, found: pd.DataFrame, tasks: Sequence[str], mode: Mode
) -> None:
    """The mean accuracy of three tasks at each of the weights, whose corners are single tasks.

    The scale is that of all modes.
    """
    means = 100 * found.groupby(["mode", "point"])["accuracy"].mean()
    found = found[found["mode"] == mode.name]
    if found.empty:
        axis.set_axis_off()
        return
    weights = np.stack([found[found["task"] == t]["weight"].to_numpy() for t in tasks], axis=1)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, HEIGHT]])
    places = weights @ corners
    look = {"c": means[mode.name], "vmin": means.min(), "vmax": means.max()}
    dots = axis.scatter(places[:, 0], places[:, 1], s=20 if in_paper() else 60, **look)
    figure.colorbar(dots, ax=axis, label="mean of three, test, %", shrink=0.7)
    sides: tuple[Any, ...] = ("center", "top"), ("center", "top"), ("center", "bottom")
    for (x, y), task, (ha, va) in zip(corners, tasks, sides, strict=True):
        axis.text(x, y + (0.06 if y else -0.06), task, ha=ha, va=va)
    axis.set(title=f"weights, {mode.label}", xlim=(-0.3, 1.3), ylim=(-0.25, 1.1))
    axis.set_axis_off()
