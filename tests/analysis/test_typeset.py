"""Analysis tables in LaTeX: the same units as the grids of the summary."""

from __future__ import annotations

import math

import pandas as pd

from tangent_arithmetic.analysis.typeset import latex


def rows_of(table: pd.DataFrame) -> list[list[str]]:
    """The header and the rows, as cells."""
    lines = [line for line in latex(table).splitlines() if " & " in line]
    return [[cell.strip() for cell in line.removesuffix("\\\\").split("&")] for line in lines]


def test_accuracies_are_in_percent_with_their_spread() -> None:
    columns = {"task": ["A", "B"], "classes": [9, 10], "zeroshot": [0.5, 1.0]}
    columns |= {"linear+taujp": [0.625, 0.7], "advantage_posthoc": [-0.00375, math.nan]}
    spread = {"zeroshot std": [0.0, 0.01234], "linear+taujp std": [0.1, math.nan]}
    table = pd.DataFrame(columns | spread | {"advantage_posthoc std": [0.01718, 0.5]})
    header, first, second = rows_of(table)
    assert header[:4] == ["task", "classes", "zero-shot, \\%", "linear, $\\tau$Jp, \\%"]
    assert header[4:] == ["advantage over post-hoc, \\%"]
    assert first == ["A", "9", "50.0 $\\pm$ 0.0", "62.5 $\\pm$ 10.0", "-0.4 $\\pm$ 1.7"]
    assert second == ["B", "10", "100.0 $\\pm$ 1.2", "70.0", "-"]


def test_other_numbers_are_as_they_are() -> None:
    table = pd.DataFrame({"mode": ["posthoc"], "task1": "A", "xi": [0.19712], "xi std": [0.01264]})
    table = table.assign(points=6, coefficient=0.15)
    assert rows_of(table) == [
        ["mode", "task 1", "xi", "points", "coefficient"],
        ["post-hoc", "A", "0.197 $\\pm$ 0.0126", "6", "0.15"],
    ]
    assert r"\begin{tabular}{llrrr}" in latex(table)
