"""The interference matrix of each linear mode, see `arithmetic.interference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import heat, in_paper, panels
from tangent_arithmetic.arithmetic.interference import matrix
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.run.modes import MODES, distinct, linear
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

MODE, IMAGES_OF = "mode", "images of"  # the columns of a table before those of the vectors


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """The matrix of each linear mode, on all images of `--interference-split`.

    Returns:
        Columns mode, "images of" (a task or the control set), and one a task vector.

    Raises:
        UsageError: if no mode is linear.
    """
    chosen = linear_of(modes, "interference")
    names = [*run.tasks, *([run.control_set] if run.control_set else [])]
    end = "Val" if run.config.interference_split == "validation" else ""
    rows: list[dict[str, Any]] = []
    for mode in chosen:
        edits = Edits(run, mode, run.tasks)
        splits = {name: edits.split(f"{name}{end}") for name in names}
        assert is_linear(edits.base)
        found = matrix(edits.base, edits.vectors, splits)
        rows += [{MODE: mode, IMAGES_OF: name, **row} for name, row in found.items()]
    return pd.DataFrame(rows)


def linear_of(modes: Sequence[str], what: str) -> list[str]:
    """The linear ones of these modes, for something that only linear models have.

    Raises:
        UsageError: if there are none.
    """
    if chosen := [mode for mode in modes if MODES[mode].linear]:
        return chosen
    raise UsageError(
        f"{what} is that of linear models, got {', '.join(modes)}; choose from "
        f"{', '.join(f'--finetuning-mode={mode}' for mode in linear())}"
    )


def matrices(table: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """The matrices of a table by mode, in order."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for mode in distinct(table[MODE]):
        square = table[table[MODE] == mode.name].drop(columns=MODE).set_index(IMAGES_OF)
        found[mode.name] = square.astype(float).to_dict(orient="index")
    return found


def draw(table: pd.DataFrame, run: Run) -> Any:
    """A heat map a mode, on one logarithmic scale."""
    found = matrices(table)
    figure, axes = panels(1, len(found), width=3.25, height=3.3)
    values = table.drop(columns=[MODE, IMAGES_OF]).to_numpy(dtype=float)
    positive = values[values > 0]
    limits = (float(positive.min()), float(positive.max())) if positive.size else (0.1, 1.0)
    if limits[0] == limits[1]:
        limits = (limits[0] / 2, limits[1] * 2)
    for axis, (mode, rows) in zip(axes[0], found.items(), strict=True):
        square = pd.DataFrame.from_dict(rows, orient="index")
        image = heat(axis, square.where(square > 0), limits, written=not in_paper(), log=True)
        axis.set(title=MODES[mode].label, xlabel="task vector")
    axes[0][0].set_ylabel("images of")
    place = {"location": "bottom", "aspect": 40} if in_paper() else {"location": "right"}
    bar = figure.colorbar(image, ax=axes[0], **place)
    bar.set_label(r"mean $\|J\tau\|^2 \,/\, \|f_0\|^2$")
    return figure
