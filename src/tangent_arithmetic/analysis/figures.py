"""Figures: their style and files, common plots, and the overview of a run's results.

Colours are from the colour-blind-safe palette of Okabe and Ito; modes also differ in markers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.run.modes import MODES, edited
from tangent_arithmetic.run.results import arithmetic_path, optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "tangent",
}


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
    axis.grid(False)
    if numeric:
        x, y = (np.asarray(edge, dtype=float) for edge in (square.columns, square.index))
        half = (x[1] - x[0]) / 2
        extent = (x[0] - half, x[-1] + half, y[0] - half, y[-1] + half)
        image = axis.imshow(numbers, vmin=low, vmax=high, origin="lower", extent=extent)
    else:
        image = axis.imshow(numbers, vmin=low, vmax=high, aspect="auto")
        axis.set_xticks(range(len(square.columns)), list(square.columns), rotation=60, ha="right")
        axis.set_yticks(range(len(square.index)), list(square.index))
    for i, j in np.ndindex(*numbers.shape) if written else ():
        colour = "black" if numbers[i, j] > (low + high) / 2 else "white"
        value = round(numbers[i, j], 2) + 0.0  # no -0.00
        text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.2f}".replace("0.", ".", 1)
        axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    return image


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
    _addition(axes[0][1], run)
    _negation(axes[0][2], summary, run.control)
    return figure


def _bars(axis: Axes, modes: list[str], figures: list[dict[str, Any]], offset: float = 0.0) -> None:
    for i, (mode, one) in enumerate(zip(modes, figures, strict=True)):
        if one["mean"] is None:  # no results
            continue
        mean, spread = 100 * one["mean"], None if one["std"] is None else 100 * one["std"]
        width, alpha = 0.8 if offset == 0 else 0.38, 1.0 if offset <= 0 else 0.45
        axis.bar(i + offset, mean, width, yerr=spread, color=MODES[mode].colour, alpha=alpha)
        axis.text(i + offset, mean + 1, f"{mean:.1f}", ha="center")


def _single(axis: Axes, summary: dict[str, Any]) -> None:
    _bars(axis, list(MODES), [summary["single"][m]["mean"] for m in MODES])
    axis.set(title="one task, fine-tuned", ylabel="test accuracy, mean of tasks, %", ylim=(0, 105))
    axis.set_xticks(range(len(MODES)), [mode.label for mode in MODES.values()])


def _addition(axis: Axes, run: Run) -> None:
    start = None
    for mode in edited():
        results = optional_results(arithmetic_path(run, mode, "additions"))
        means = {float(c): one.get("avg_top1") for c, one in results.get("val", {}).items()}
        curve = {c: 100 * means[c] for c in sorted(means) if means[c] is not None}
        axis.plot(
            list(curve), list(curve.values()), color=MODES[mode].colour, label=MODES[mode].label
        )
        if (best := results.get("coefficient")) in curve:
            axis.plot(best, curve[best], "o", color=MODES[mode].colour)
        start = curve.get(0.0, start)
    if start is not None:
        axis.axhline(start, color=MODES["none"].colour, linestyle=":", label="zero-shot")
    axis.set(xlabel="coefficient", ylabel="validation accuracy, mean, %")
    axis.set_title(f"all {len(run.tasks)} task vectors added")
    axis.legend(frameon=False)


def _negation(axis: Axes, summary: dict[str, Any], control: str) -> None:
    modes = ["none", *edited()]
    first = summary["negation"]["standard"]
    target = [first["zero-shot"], *(summary["negation"][m]["target"] for m in edited())]
    kept = [first["zero-shot control"], *(summary["negation"][m]["control"] for m in edited())]
    _bars(axis, modes, target, offset=-0.2)
    _bars(axis, modes, kept, offset=0.2)
    axis.set(title=f"one task negated: task (solid), {control} (pale)", ylim=(0, 105))
    axis.set_ylabel("test accuracy, %")
    axis.set_xticks(range(len(modes)), ["zero-shot", *(MODES[mode].label for mode in edited())])
