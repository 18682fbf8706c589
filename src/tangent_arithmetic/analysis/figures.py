"""Figures: their style and files, common plots, and the overview of a run's results.

Colours are from the colour-blind-safe palette of Okabe and Ito; modes also differ in markers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.run.modes import MODES, edited
from tangent_arithmetic.run.results import arithmetic_path, results_if_any
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999",
    "#332288", "#aa4499",
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "figure.dpi": 110, "savefig.dpi": 160, "svg.fonttype": "none",
    "svg.hashsalt": "tangent",
}  # fmt: skip


def plain(draw: Callable[..., Any], *values: Any) -> Any:
    """The figure that `draw(*values)` returns, in our style and without a display."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        return draw(*values)


def save(figure: Figure, folder: Path, stem: str, note: str = "") -> None:
    """Writes a figure as PNG and SVG, with `note` as a line below it."""
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    if note:
        figure.text(0.995, -0.015, note, ha="right", va="top", fontsize=6.5, color="#666666")
    with rc_context(STYLE):
        for kind, facts in (("png", {}), ("svg", {"Date": None})):
            with atomic(folder / f"{stem}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, bbox_inches="tight", metadata=facts)
    plt.close(figure)


def panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Any, list[list[Any]]]:
    """A figure with `rows` by `columns` panels, each of a size in inches."""
    from matplotlib import pyplot as plt

    size = (columns * width, rows * height)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    return figure, axes.tolist()


def heat(
    axis: Axes, square: pd.DataFrame, limits: tuple[float, float], written: bool = False
) -> Any:
    """A heat map of a table, with its first row at the bottom if row names are numbers.

    Args:
        axis: the axis to draw on.
        square: the values, with named rows and columns.
        limits: range of the colour scale.
        written: whether to write each value in its cell.
    """
    import numpy as np

    numbers = square.to_numpy(dtype=float)
    numeric = np.issubdtype(np.asarray(square.index).dtype, np.number)
    low, high = limits
    extent = None
    if numeric:
        x, y = (np.asarray(edge, dtype=float) for edge in (square.columns, square.index))
        half = (x[1] - x[0]) / 2
        extent = (x[0] - half, x[-1] + half, y[0] - half, y[-1] + half)
    image = axis.imshow(
        numbers, cmap="viridis", vmin=low, vmax=high, origin="lower" if numeric else "upper",
        extent=extent, aspect="equal" if numeric else "auto",
    )  # fmt: skip
    axis.grid(False)
    if not numeric:
        axis.set_xticks(range(len(square.columns)), list(square.columns), rotation=60, ha="right")
        axis.set_yticks(range(len(square.index)), list(square.index))
    if written:
        middle = (low + high) / 2
        for i, j in np.ndindex(*numbers.shape):
            colour = "black" if numbers[i, j] > middle else "white"
            value = round(numbers[i, j], 2) + 0.0  # no -0.00
            text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.2f}".replace("0.", ".", 1)
            axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    return image


def stacked(shares: pd.DataFrame, label: str) -> Any:
    """A stacked bar per row, with one segment per column."""
    figure, axes = panels(1, 1, width=7.0, height=1.0 + 0.6 * len(shares))
    axis = axes[0][0]
    left = 0.0 * shares.iloc[:, 0]
    hatches = ("", "", "///", "", "...", "", "xx", "", "\\\\", "")
    for k, name in enumerate(shares.columns):
        axis.barh(
            list(shares.index), shares[name], left=left, label=name, height=0.7,
            color=LAYERS[k % len(LAYERS)], edgecolor="white", hatch=hatches[k % len(hatches)],
        )  # fmt: skip
        left = left + shares[name]
    axis.invert_yaxis()
    axis.set(xlabel=label, xlim=(0, 100))
    axis.legend(frameon=False, fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return figure


def overview(run: Run, summary: dict[str, Any], path: Path) -> None:
    """Draws single-task accuracy, the addition sweep and negation for all modes.

    Args:
        run: the run whose sweep to draw.
        summary: means over seeds, see `tangent_arithmetic.run.summary.collect`.
        path: PNG file to write; an SVG is written beside it.
    """
    save(plain(_overview, run, summary), path.parent, path.stem)


def _overview(run: Run, summary: dict[str, Any]) -> Any:
    figure, axes = panels(1, 3, width=4.3, height=3.8)
    _single(axes[0][0], summary)
    _addition(axes[0][1], run, summary)
    _negation(axes[0][2], summary, run.control)
    return figure


def _bars(axis: Any, modes: list[str], figures: list[dict[str, Any]], offset: float = 0.0) -> None:
    for i, (mode, one) in enumerate(zip(modes, figures, strict=True)):
        if one["mean"] is None:  # no results
            continue
        axis.bar(
            i + offset,
            100 * one["mean"],
            0.8 if offset == 0 else 0.38,
            yerr=None if one["std"] is None else 100 * one["std"],
            color=MODES[mode].colour,
            alpha=1.0 if offset <= 0 else 0.45,
        )
        axis.text(i + offset, 100 * one["mean"] + 1, f"{100 * one['mean']:.1f}", ha="center")


def _single(axis: Any, summary: dict[str, Any]) -> None:
    _bars(axis, list(MODES), [summary["single"][m]["mean"] for m in MODES])
    axis.set(title="one task, fine-tuned", ylabel="test accuracy, mean of tasks, %", ylim=(0, 105))
    axis.set_xticks(range(len(MODES)), [mode.label for mode in MODES.values()])


def _addition(axis: Any, run: Run, summary: dict[str, Any]) -> None:
    start = None
    for mode in edited():
        results = results_if_any(arithmetic_path(run, mode, "additions"))
        means = {float(c): one.get("avg_top1") for c, one in results.get("val", {}).items()}
        curve = {c: 100 * means[c] for c in sorted(means) if means[c] is not None}
        axis.plot(curve.keys(), curve.values(), color=MODES[mode].colour, label=MODES[mode].label)
        if (best := results.get("coefficient")) in curve:
            axis.plot(best, curve[best], "o", color=MODES[mode].colour)
        start = curve.get(0.0, start)
    if start is not None:
        axis.axhline(start, color=MODES["none"].colour, linestyle=":", label="zero-shot")
    axis.set(
        title=f"all {len(run.tasks)} task vectors added",
        xlabel="coefficient",
        ylabel="validation accuracy, mean, %",
    )
    axis.legend(frameon=False)


def _negation(axis: Any, summary: dict[str, Any], control: str) -> None:
    modes = ["none", *edited()]
    first = summary["negation"]["standard"]
    target = [first["zero-shot"], *(summary["negation"][m]["target"] for m in edited())]
    kept = [first["zero-shot control"], *(summary["negation"][m]["control"] for m in edited())]
    _bars(axis, modes, target, offset=-0.2)
    _bars(axis, modes, kept, offset=0.2)
    axis.set(title=f"one task negated: task (solid), {control} (pale)", ylim=(0, 105))
    axis.set_ylabel("test accuracy, %")
    axis.set_xticks(range(len(modes)), ["zero-shot", *(MODES[mode].label for mode in edited())])
