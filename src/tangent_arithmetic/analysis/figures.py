"""Figures: their styles and files, common plots, and the overview of a run's results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.run.modes import MODES, Mode, distinct
from tangent_arithmetic.run.present import current_results, with_results
from tangent_arithmetic.run.results import arithmetic_path
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import summarised
from tangent_arithmetic.runtime.atomic import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.25  # inches, the width of a column in a paper
NARROW = 3.3  # inches; of narrower panels two fit side by side into a column

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
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "tangent",
    "pdf.fonttype": 42,  # TrueType, embedded
    "ps.fonttype": 42,
}
PAPER: dict[Any, Any] = {
    **STYLE,
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "errorbar.capsize": 1.8,
    "legend.handlelength": 1.5,
    "savefig.dpi": 300,
}
STYLES = {"screen": STYLE, "paper": PAPER}


def plain(draw: Callable[..., Any], *values: Any, style: str = "screen") -> Any:
    """The figure that `draw(*values)` returns, in a style of `STYLES` and without a display."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLES[style]):
        figure = draw(*values)
        figure.set_label(style)
        return figure


def save(figure: Figure, folder: Path, stem: str, note: str = "") -> None:
    """Writes a figure as PNG, SVG and PDF.

    Args:
        figure: the figure, as `plain` returns it.
        folder: where to write it; in style "paper" to `paper` in it.
        stem: name of the files, without their endings.
        note: what the figure is of: a line below it, in style "paper" only in the files' metadata.
    """
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    style = str(figure.get_label()) or "screen"
    options: dict[str, Any] = {}
    if style == "paper":
        folder = folder / style
    else:
        options["bbox_inches"] = "tight"
        if note:
            place: dict[str, Any] = {
                "ha": "right",
                "va": "top",
                "fontsize": 6.5,
                "color": palette.INK,
            }
            figure.text(0.995, -0.015, note, **place)
    facts: dict[str, dict[str, Any]] = {
        "png": {"Description": note},
        "svg": {"Date": None, "Description": note},
        "pdf": {"CreationDate": None, "Subject": note},
    }
    with rc_context(STYLES[style]):
        for kind, about in facts.items():
            with atomic(folder / f"{stem}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, metadata=about, **options)
    plt.close(figure)


def write(
    draw: Callable[..., Any],
    *values: Any,
    folder: Path,
    stem: str,
    note: str = "",
    style: str = "screen",
) -> None:
    """Writes the figure that `draw(*values)` returns, and that in another style beside it.

    The screen's is always written, so that it is never one of earlier numbers.
    """
    for each in dict.fromkeys(("screen", style)):
        save(plain(draw, *values, style=each), folder, stem, note)


def means(table: pd.DataFrame, key: str, column: str) -> tuple[pd.Series, pd.Series | None]:
    """The mean of the rows of each key in percent, and its standard deviation over seeds.

    Rows are averaged within a seed first, since the mean varies less than they do.

    Args:
        table: of one seed, or of several that have the same rows, with the column seed.
        key: the column that is kept.
        column: the values.

    Returns:
        The means by key, and their deviations; None for those of one seed.
    """
    if "seed" not in table or table["seed"].nunique() == 1:
        return 100 * table.groupby(key)[column].mean(), None
    by_seed = 100 * table.groupby([key, "seed"])[column].mean()
    return by_seed.groupby(key).mean(), by_seed.groupby(key).std()


def over_seeds(table: pd.DataFrame, column: str) -> pd.Series | None:
    """Each row's standard deviation over seeds in percent, where the table has it.

    See `seeds.averaged`; that of means of rows is another, see `means`.
    """
    return 100 * table[f"{column} std"] if f"{column} std" in table else None


def spread_of(table: pd.DataFrame, column: str) -> str:
    """The largest standard deviation over seeds, for figures without bars; else nothing."""
    if f"{column} std" not in table:
        return ""
    return f"\nstandard deviation over seeds: at most {table[f'{column} std'].max():.2g}"


def in_paper() -> bool:
    """Whether the figure being drawn is in style "paper"."""
    from matplotlib import rcParams

    return bool(rcParams["font.size"] == PAPER["font.size"])


def panels(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Any, list[list[Any]]]:
    """A figure with `rows` by `columns` panels, each of a size in inches.

    In style "paper" the figure is a column wide: several rows are made narrower, and one row of
    panels is broken into rows of one or two.
    """
    from matplotlib import pyplot as plt

    lines, each = rows, columns
    if in_paper():
        if rows == 1:
            each = min(columns, 2 if width < NARROW else 1)
            lines = math.ceil(columns / each)
        height *= COLUMN / each / width
        height = max(height, 1.7) if rows == 1 else 1.3 * height  # titles take their part
        width = COLUMN / each
    size = (each * width, lines * height)
    figure, grid = plt.subplots(
        lines, each, figsize=size, squeeze=False, layout="constrained", **options
    )
    if (lines, each) == (rows, columns):
        return figure, grid.tolist()
    flat = grid.ravel().tolist()
    for axis in flat[columns:]:
        axis.remove()
    return figure, [flat[:columns]]


def legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """A legend of an axis, below the figure."""
    if not in_paper():  # cut to what is drawn when it is saved
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=columns)
        return
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, 3))


def heat(
    axis: Axes,
    square: pd.DataFrame,
    limits: tuple[float, float],
    colours: str = palette.MAGNITUDE,
    written: bool = False,
    log: bool = False,
) -> Any:
    """A heat map of a table, with its first row at the bottom if row names are numbers.

    Args:
        axis: the axis to draw on.
        square: the values, with named rows and columns; cells of NaN are left grey.
        limits: range of the colour scale.
        colours: name of the colour map.
        written: whether to write each value in its cell.
        log: whether the colour scale is logarithmic.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    numbers = square.to_numpy(dtype=float)
    numeric = np.issubdtype(np.asarray(square.index).dtype, np.number)
    low, high = limits
    axis.grid(False)
    shades = colormaps[colours].with_extremes(bad="#e3e3e3")
    scale: dict[str, Any] = {"norm": (LogNorm if log else Normalize)(low, high), "cmap": shades}
    if numeric:
        x, y = (np.asarray(edge, dtype=float) for edge in (square.columns, square.index))
        half = (x[1] - x[0]) / 2
        extent = (x[0] - half, x[-1] + half, y[0] - half, y[-1] + half)
        image = axis.imshow(numbers, origin="lower", extent=extent, **scale)
    else:
        image = axis.imshow(numbers, aspect="auto", **scale)
        axis.set_xticks(range(len(square.columns)), list(square.columns), rotation=60, ha="right")
        axis.set_yticks(range(len(square.index)), list(square.index))
    for i, j in np.ndindex(*numbers.shape) if written else ():
        if np.isnan(numbers[i, j]):
            continue
        red, green, blue, _ = image.cmap(image.norm(numbers[i, j]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "white" if dark else "black"
        size = 4.5 if in_paper() else 6.5
        value = numbers[i, j]
        linear = short(value) if high <= 1 else f"{round(value, 1) + 0.0:.1f}"
        text = f"{value:.1g}" if log else linear
        axis.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    return image


def named(axis: Axes, labels: Sequence[str]) -> None:
    """Names the places 0, 1, ... of an axis, at an angle if there are many."""
    many: dict[str, Any] = {"rotation": 35, "ha": "right"} if len(labels) > 4 else {}
    axis.set_xticks(range(len(labels)), list(labels), **many)


def short(value: float) -> str:
    """A number with two decimals, without a zero before the point."""
    rounded = round(value, 2) + 0.0  # no -0.00
    return f"{rounded:.2f}" if abs(rounded) >= 1 else f"{rounded:.2f}".replace("0.", ".", 1)


def overview(run: Run, summary: dict[str, Any], path: Path) -> None:
    """Draws single-task accuracy, the addition sweep and negation for all modes, over seeds.

    Args:
        run: one of the runs that the summary beside their folders names; itself without one.
        summary: means over seeds, see `tangent_arithmetic.run.summary.collect`.
        path: PNG file to write; SVG and PDF are written beside it.
    """
    write(_overview, run, summary, folder=path.parent, stem=path.stem, style=run.config.style)


def _overview(run: Run, summary: dict[str, Any]) -> Any:
    figure, axes = panels(1, 3, width=4.3, height=3.8)
    _single(axes[0][0], summary)
    _addition(axes[0][1], summarised(run) or [run])
    _negation(axes[0][2], summary, run.control_set)
    return figure


def _bars(
    axis: Axes,
    modes: Sequence[Mode],
    figures: Sequence[dict[str, Any]],
    offset: float = 0.0,
    **options: Any,
) -> None:
    """A bar a mode, with the standard deviation over seeds and the value above it."""
    for i, (mode, one) in enumerate(zip(modes, figures, strict=True)):
        if one["mean"] is None:  # no results
            continue
        mean, spread = 100 * one["mean"], 100 * one["std"] if one["std"] else None
        width = 0.8 if offset == 0 else 0.38
        style = {"color": mode.colour, "ecolor": palette.INK, **options}
        axis.bar(i + offset, mean, width, yerr=spread, **style)
        size = "xx-small" if in_paper() or len(modes) > 5 else "small"
        above = mean + (spread or 0) + 1
        axis.text(i + offset, above, f"{mean:.1f}", ha="center", fontsize=size)


def _single(axis: Axes, summary: dict[str, Any]) -> None:
    known = {m: one["mean"] for m, one in summary["single"].items()}
    modes = distinct(m for m, one in known.items() if one["mean"] is not None)
    _bars(axis, modes, [known[mode.name] for mode in modes])
    axis.set(title="one task, fine-tuned", ylabel="test accuracy, mean of tasks, %", ylim=(0, 105))
    named(axis, [mode.label for mode in modes])


def _addition(axis: Axes, runs: Sequence[Run]) -> None:
    """The mean of the runs' sweeps with the standard deviation over seeds, by mode."""
    start = None
    for mode in distinct(m for run in runs for m in with_results(run.results) if MODES[m].edits):
        paths = [arithmetic_path(run, mode.name, "additions") for run in runs]
        found = [current_results(path, mode.name) for path in paths]
        curves = [curve for results in found if (curve := _swept(results))]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        if not shared:
            continue
        values = np.array([[curve[c] for c in shared] for curve in curves])  # (runs, coefficients)
        mean = dict(zip(shared, values.mean(axis=0).tolist(), strict=True))
        axis.plot(shared, list(mean.values()), color=mode.colour, label=mode.label)
        if len(values) > 1:
            edges = [values.mean(axis=0) + sign * values.std(axis=0, ddof=1) for sign in (-1, 1)]
            axis.fill_between(shared, *edges, color=mode.colour, alpha=0.25, lw=0)
        chosen = {best for results in found if (best := results.get("coefficient")) in mean}
        for best in chosen:
            axis.plot(best, mean[best], mode.marker, color=mode.colour)
        start = mean.get(0.0, start)
    if start is not None:
        axis.axhline(start, color=palette.ZEROSHOT, linestyle=":", label="zero-shot")
    axis.set(xlabel="coefficient (marker: chosen)", ylabel="validation accuracy, mean, %")
    axis.set_title(f"all {len(runs[0].tasks)} task vectors added")
    if axis.lines:
        axis.legend()


def _swept(results: dict[str, Any]) -> dict[float, float]:
    """The mean validation accuracy at each coefficient of a sum, in percent."""
    means = {float(c): one.get("avg_top1") for c, one in results.get("val", {}).items()}
    return {c: 100 * means[c] for c in sorted(means) if means[c] is not None}


def _negation(axis: Axes, summary: dict[str, Any], control: str | None) -> None:
    by_mode = summary["negation"]
    modes = distinct(["none", *by_mode]) if by_mode else []

    def bars(before: str, after: str) -> list[dict[str, Any]]:
        starts = (one[before] for one in by_mode.values() if one[before]["mean"] is not None)
        edits = [by_mode[mode.name][after] for mode in modes[1:]]
        return [next(starts, {"mean": None}), *edits] if modes else []

    axis.set_title("one task negated")
    _bars(axis, modes, bars("zero-shot", "target"), offset=-0.2 if control else 0.0)
    if control:
        hollow = {"color": "white", "edgecolor": palette.CONTROL, "hatch": "////"}
        _bars(axis, modes, bars("zero-shot control", "control"), offset=0.2, **hollow)
        axis.set_title(f"one task negated: task (solid), {control} (control, hatched)")
    axis.set(ylabel="test accuracy, %", ylim=(0, 105))
    named(axis, [mode.label for mode in modes])
