"""Figures of the study: means over data sets and seeds, with the seeds' standard deviation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.arithmetic.task_vectors import OPERATIONS
from tangent_arithmetic.artificial_data.presets import BASE
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.runtime.atomic import atomic

if TYPE_CHECKING:
    import pandas as pd

STYLES = {"standard": "-", "linear": "--", "posthoc": "-.", "taujp": ":"}
SHOWN = {name: MODES["linear+taujp" if name == "taujp" else name] for name in STYLES}
ACCURACY = "test accuracy, %"


def draw(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Writes a PNG for each table of edits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    for name, (panels, paint) in {
        "operations": (4, _operations),
        "sums": (2, _sums),
        "negations": (len(STYLES), _negations),
        "interpolations": (1, _interpolations),
    }.items():
        size = (1.2 + 3.3 * panels, 3.6)
        figure, axes = plt.subplots(
            1, panels, figsize=size, layout="constrained", sharey=True, squeeze=False
        )
        paint(axes[0], tables)
        axes[0][0].set_ylabel(ACCURACY)
        axes[0][0].set_ylim(0, 102)
        for axis in axes[0]:
            axis.grid(alpha=0.3)
        with atomic(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110, format="png")
        plt.close(figure)


def _line(axis: Any, part: pd.DataFrame, x: str, **style: Any) -> None:
    """Accuracy over x: the mean of the seeds' means, and their standard deviation."""
    seeds = 100 * part.groupby(["seed", x])["accuracy"].mean().unstack("seed")
    mean, deviation = seeds.mean(axis=1), seeds.std(axis=1).fillna(0.0)
    axis.plot(mean.index, mean, **style)
    low, high, colour = mean - deviation, mean + deviation, style["color"]
    axis.fill_between(mean.index, low, high, alpha=0.2, linewidth=0, color=colour)


def _style(mode: str) -> dict[str, Any]:
    shown = SHOWN[mode]
    return {"color": shown.colour, "label": shown.label, "linestyle": STYLES[mode]}


def _chance(axis: Any, tables: dict[str, pd.DataFrame]) -> None:
    own = tables["training"]
    chance = 100 * own[own["dataset"] != BASE]["chance"].mean()
    axis.axhline(chance, color=MODES["none"].colour, linestyle=":", label="guessing")


def _operations(axes: Any, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["operations"]
    colours = {"pre-trained": MODES["standard"].colour, "scratch": "#555555"}
    labels = {"pre-trained": "from the base model", "scratch": "trained from scratch"}
    lines = {"pre-trained": "-", "scratch": "--"}
    for axis, operation in zip(axes, OPERATIONS, strict=True):
        for start, color in colours.items():
            part = table[(table["operation"] == operation) & (table["start"] == start)]
            style = {"color": color, "label": labels[start], "linestyle": lines[start]}
            _line(axis, part, "coefficient", **style)
        _chance(axis, tables)
        axis.set(title=operation, xlabel="coefficient")
    axes[0].legend(frameon=False, fontsize=8)


def _sums(axes: Any, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["sums"]
    table = table[table["split"] == "test"]
    counts = table["tasks"].str.count(r"\+") + 1
    for axis, count, title in zip(axes, (2, counts.max()), ("pairs", "all vectors"), strict=True):
        for mode in STYLES:
            part = table[(counts == count) & (table["mode"] == mode)]
            _line(axis, part, "coefficient", **_style(mode))
        _chance(axis, tables)
        axis.set(title=f"{title} added ({count})", xlabel="coefficient")
    axes[0].legend(frameon=False, fontsize=8)


def _negations(axes: Any, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["negations"]
    table = table[table["split"] == "test"]
    for axis, mode in zip(axes, STYLES, strict=True):
        part = table[table["mode"] == mode]
        control, colour = part["dataset"] == BASE, SHOWN[mode].colour
        label = f"control ({BASE})"
        _line(axis, part[control], "coefficient", color=colour, linestyle="--", label=label)
        _line(axis, part[~control], "coefficient", color=colour, label="the negated task")
        _chance(axis, tables)
        axis.set(title=f"{SHOWN[mode].label}: one vector negated", xlabel="coefficient")
    axes[0].legend(frameon=False, fontsize=8)


def _interpolations(axes: Any, tables: dict[str, pd.DataFrame]) -> None:
    table = tables["interpolations"]
    for mode in STYLES:
        part = table[(table["mode"] == mode) & (table["dataset"] == table["second"])]
        _line(axes[0], part, "alpha", **_style(mode))
    _chance(axes[0], tables)
    axes[0].set(title="second task of each pair", xlabel="alpha (0: first vector, 1: second)")
    axes[0].legend(frameon=False, fontsize=8)
