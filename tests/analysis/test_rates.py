"""Figures of the study of rates: means and deviations over seeds, and divergences."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import pytest

from tangent_arithmetic.analysis.figures import plain
from tangent_arithmetic.analysis.rates import draw, draw_along
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run

SINGLE = {0.1: (0.7, 0.8), 1.0: (0.9,)}


def rows() -> list[dict[str, Any]]:
    """Two seeds at the lower rate, one of which diverges at the higher."""
    found: list[dict[str, Any]] = []
    for factor, values in SINGLE.items():
        for seed, single in enumerate(values):
            along = {"A": {"3": 0.4 + single / 10, "6": 0.8, "12": 1.0}, "B": {"1": 0.6, "2": 1.0}}
            row = {"mode": "linear", "factor": factor, "seed": seed, "single": single}
            found.append({**row, "sum": 0.5, "target": 0.2, "control": 0.4, "along": along})
    return [*found, {"mode": "linear", "factor": 1.0, "seed": 1, "diverged": "the loss is nan"}]


def bars(axis: Any, place: int = 0) -> list[tuple[float, float, float]]:
    """The points of a line, with half the length of their bars; 0 for none."""
    line, _, (segments,) = axis.containers[place].lines
    ends = [(part[:, 1].max() - part[:, 1].min()) / 2 if len(part) else 0.0
            for part in segments.get_segments()]  # fmt: skip
    return list(zip(line.get_xdata(), line.get_ydata(), ends, strict=True))


def test_accuracies_against_the_rate() -> None:
    figure = plain(draw, rows(), Run.of(Config()))
    single, _, negated = figure.axes
    (low, *point), high = bars(single)
    assert (low, high[0]) == (0.1, 1.0) and high[1] == pytest.approx(90) and not high[2] > 0
    assert point == pytest.approx([100 * mean(SINGLE[0.1]), 100 * stdev(SINGLE[0.1])])
    assert [line.get_xdata() for line in single.lines if line.get_marker() == "x"] == [[1.0]]
    assert [p[1] for p in bars(negated)] == pytest.approx([20, 20])
    assert [p[1] for p in bars(negated, 1)] == pytest.approx([40, 40])
    assert [text.get_text() for text in negated.get_legend().texts] == ["linear", "linear, Shapes"]


def test_cosines_along_fine_tuning() -> None:
    (axis,) = plain(draw_along, rows()).axes
    share, cosine, spread = bars(axis)[0]  # B has none before its half
    assert (share, cosine) == (0.25, pytest.approx((0.475 + 0.6) / 2))
    assert spread == pytest.approx(stdev([0.47, 0.48]) / 2)
    assert bars(axis)[-1][1] == 1 and len(axis.containers) == 2


def test_a_study_whose_runs_all_diverge_has_figures() -> None:
    diverged = rows()[-1:]
    crosses = [line for axis in plain(draw, diverged, Run.of(Config())).axes for line in axis.lines
               if line.get_marker() == "x"]  # fmt: skip
    assert len(crosses) == 3
    assert not plain(draw_along, diverged).axes[0].containers
