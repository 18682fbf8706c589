"""Accuracies as text: percent, means, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def percent(value: float | None) -> str:
    """An accuracy in percent with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}"


def score(metrics: Mapping[str, Any], name: str) -> Any:
    """The measure of a data set among metrics: top-1, or mean average precision of multi-label."""
    return metrics.get(f"{name}:top1", metrics.get(f"{name}:map"))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if there are no values, or if one of them is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        numbers = [cell.strip().rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        return "| " + " | ".join([first, *numbers]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def accuracy_table(tasks: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> str:
    """A table of accuracies in percent: a column a task, and their mean."""
    lines = []
    for name, values in rows.items():
        lines.append([name, *map(percent, values), percent(mean(values))])
    return markdown_table(["%", *tasks, "mean"], lines)
