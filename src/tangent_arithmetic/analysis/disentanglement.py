r"""The disentanglement error: whether a task vector changes predictions only on its own task.

\[ \xi(a_1, a_2) = \sum_{t=1,2} E_{x \sim \mu_t}
   [\, y(x; \theta_0 + a_t \tau_t) \neq y(x; \theta_0 + a_1 \tau_1 + a_2 \tau_2) \,] \]

with y the predicted class, the highest logit. 0 is perfect disentanglement, 2 the maximum. As one
number it is the mean over a grid of coefficients from 0 to 1.

Source: arXiv:2305.12827, the disentanglement error with the prediction error as distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from tangent_arithmetic.analysis.edits import EditedEncoder, Edits
from tangent_arithmetic.analysis.figures import heat, in_paper, named, panels, spread_of
from tangent_arithmetic.analysis.intervals import bootstrap
from tangent_arithmetic.run.modes import MODES, distinct, in_order
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Bool

REACH = 2.0  # coefficients from -REACH to REACH
POINTS = 11  # on each axis, for standard models, which need a pass over the images a point
AFFINE_POINTS = 41  # for linear models, which need one pass for all
FRAME = 6  # on each axis from 0 to 1, of the error as one number


def pairs_of(run: Run) -> list[tuple[str, str]]:
    """The pairs of tasks: `--pairs`, or up to three pairs of the run's first six tasks.

    Raises:
        UsageError: for an invalid or repeated pair, or if the run has one task alone.
    """
    suite, named = run.suite, run.config.pairs
    if not named:
        tasks = run.tasks
        if len(tasks) < 2:
            raise UsageError(
                f"expected at least two tasks to pair, got {tasks[0]}; set --pairs=A+B"
            )
        return list(zip(tasks[0:6:2], tasks[1:6:2], strict=False))  # an odd one is left out
    pairs: list[tuple[str, str]] = []
    for text in named:
        names = [name.strip() for name in text.split("+", 1)]
        pair = [suite.check(name).removesuffix("Val") for name in names if len(names) == 2]
        if len(set(pair)) != 2:
            raise UsageError(f"expected --pairs of two tasks each, such as A+B,C+D; got {text!r}")
        if set(pair) in map(set, pairs):
            raise UsageError(f"--pairs names {' and '.join(pair)} twice; expected each pair once")
        pairs.append((pair[0], pair[1]))
    return pairs


def disagreements(
    model: EditedEncoder, pair: tuple[str, str], coefs: Sequence[float]
) -> tuple[list[tuple[float, float]], list[Bool[Tensor, "points images"]]]:
    """Whether the other vector changes the prediction, for each point of a square grid and image.

    Args:
        model: has a vector and a split for each of the two tasks.
        pair: names of the tasks.
        coefs: coefficients of either vector.

    Returns:
        The points, and the flags on the images of each of the two tasks; this rank's share.
    """
    grid = list(product(coefs, coefs))
    joint = [dict(zip(pair, at, strict=True)) for at in grid]
    flags = []
    for t, task in enumerate(pair):
        alone = [{task: coef} for coef in coefs]
        classes, _ = model.predictions(task, [*joint, *alone])
        own = classes[len(joint) :][[coefs.index(at[t]) for at in grid]]
        flags.append(classes[: len(joint)] != own)
    return grid, flags


def errors(model: EditedEncoder, pair: tuple[str, str], coefs: Sequence[float]) -> pd.DataFrame:
    """The disentanglement error of two task vectors on a square grid.

    Args:
        model: has a vector and a split for each of the two tasks.
        pair: names of the tasks.
        coefs: coefficients of either vector.

    Returns:
        Columns coef1, coef2, error1, error2 (the two terms) and error.
    """
    grid, flags = disagreements(model, pair, coefs)
    terms = [model.rates(own) for own in flags]
    rows = [(*at, one, other, one + other) for at, one, other in zip(grid, *terms, strict=True)]
    return pd.DataFrame(rows, columns=["coef1", "coef2", "error1", "error2", "error"])


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """The `errors` of each pair and mode on the test splits.

    Returns:
        Columns mode, task1, task2, and those of `errors`.
    """
    parts = []
    for mode, pair in product(modes, pairs_of(run)):
        points = run.config.grid_points or (AFFINE_POINTS if MODES[mode].linear else POINTS)
        coefs = [round(float(c), 10) for c in np.linspace(-REACH, REACH, points)]
        part = errors(Edits(run, mode, pair), pair, coefs)
        named = {"mode": mode, "task1": pair[0], "task2": pair[1]}
        parts.append(part.assign(**named)[[*named, *part.columns]])
    return pd.concat(parts, ignore_index=True)


def xi(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """The mean error over coefficients from 0 to 1 of each pair and mode, on the test splits.

    The grid has `FRAME` points on each axis, or so many that their distance is that of
    `--grid-points`.

    Returns:
        Columns mode, task1, task2, xi, low, high (a bootstrap interval over images of 95 %),
        points (on each axis).
    """
    rows, points = [], FRAME
    if grid := run.config.grid_points:
        points = max(2, round((grid - 1) / (2 * REACH)) + 1)
    coefs = [round(float(c), 10) for c in np.linspace(0, 1, points)]
    for mode, pair in product(modes, pairs_of(run)):
        _, flags = disagreements(Edits(run, mode, pair), pair, coefs)
        shares = [ddp.gather(own.double().mean(dim=0).numpy()) for own in flags]
        parts = [np.concatenate(share) for share in shares]
        value = sum(float(part.mean()) for part in parts)
        rows.append((mode, *pair, value, *bootstrap(parts, run.seed), points))
    return pd.DataFrame(rows, columns=["mode", "task1", "task2", "xi", "low", "high", "points"])


def draw_xi(table: pd.DataFrame, run: Run) -> Any:
    """The error of each pair by mode, with the interval of one seed, or the spread over seeds."""
    pairs = list(dict.fromkeys(zip(table["task1"], table["task2"], strict=True)))
    modes = distinct(table["mode"])
    figure, axes = panels(1, 1, width=4.6, height=3.2)
    axis = axes[0][0]
    for k, mode in enumerate(modes):
        own = table[table["mode"] == mode.name].set_index(["task1", "task2"]).loc[pairs]
        places = [i + 0.12 * (k - (len(modes) - 1) / 2) for i in range(len(pairs))]
        one_seed = "low" in own
        bars = [own["xi"] - own["low"], own["high"] - own["xi"]] if one_seed else own.get("xi std")
        style = {"fmt": mode.marker, "color": mode.colour, "label": mode.label, "ms": 4}
        axis.errorbar(places, own["xi"], bars, **style)
    named(axis, [" +\n".join(pair) for pair in pairs])
    axis.set(ylabel="disentanglement error, mean on [0, 1]²", ylim=(0, None))
    axis.legend()
    return figure


def draw(table: pd.DataFrame, run: Run) -> Any:
    """A heat map for each mode (row) and pair (column), on one scale; a frame from 0 to 1."""
    from matplotlib.patches import Rectangle

    modes = in_order(table["mode"])
    pairs = list(dict.fromkeys(zip(table["task1"], table["task2"], strict=True)))
    figure, axes = panels(len(modes), len(pairs), width=3.0, height=2.7)
    ticks, small = ([-2, 0, 2], "x-small") if in_paper() else ([-2, -1, 0, 1, 2], "medium")
    for (i, mode), (j, pair) in product(enumerate(modes), enumerate(pairs)):
        axis = axes[i][j]
        part = table[(table["mode"] == mode) & (table["task1"] == pair[0])]
        part = part[part["task2"] == pair[1]]
        square = part.pivot(index="coef2", columns="coef1", values="error")
        image = heat(axis, square, limits=(0.0, 1.0))
        axis.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor="white", lw=1.2))
        axis.set(xticks=ticks, yticks=ticks)
        axis.set_ylabel(pair[1], fontsize=small)
        if i == 0:
            title = "{} +\n{}" if in_paper() else "{} + {}"
            axis.set_title(title.format(*pair), fontsize="medium" if in_paper() else None)
        if i == len(modes) - 1:
            axis.set_xlabel(pair[0], fontsize=small)
        if j == 0:
            axis.set_ylabel(f"{MODES[mode].label}\n{pair[1]}", fontsize=small)
        if in_paper():
            axis.tick_params(labelbottom=i == len(modes) - 1, labelleft=j == 0)
    everything = [axis for row in axes for axis in row]
    place = {"location": "bottom", "aspect": 40} if in_paper() else {"location": "right"}
    bar = figure.colorbar(image, ax=everything, extend="max", **place)
    note = spread_of(table, "error")
    bar.set_label(f"disentanglement error (axes: coefficients; frame: 0 to 1){note}")
    return figure
