"""A table of the page: its rows, the best cells, and its CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from tangent_arithmetic.run.latex import booktabs
from tangent_arithmetic.run.tables import percent

UNVERIFIED = " †"
COEFFICIENT = "coefficient"
ACCURACY = "test accuracy, %"


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: its first column.
        cells: accuracies in percent, or other numbers, formatted.
        values: the fractions of this run's own rows, for the best and for means over seeds.
        published: whether it comes from a paper or another project.
        seeds: whether it is a mean over seeds.
        note: a note below the table.
        styles: the CSS of each cell, of a heat map; empty for none.
    """

    label: str
    cells: list[str]
    values: tuple[float | None, ...] = ()
    published: bool = False
    seeds: bool = False
    note: str = ""
    styles: tuple[str, ...] = ()

    @property
    def own(self) -> bool:
        """Whether it holds this run's own results."""
        return bool(self.values) and not self.seeds


@dataclass
class Table:
    """A table of the page; `columns` are those after the label.

    Attributes:
        name: of the file to download, and its anchor.
        title: above it.
        columns: after the label.
        lower: columns in which the lowest value is best.
        lines: the rows.
        corner: the head of the first column.
        about: notes below the table, before those of its rows.
    """

    name: str
    title: str
    columns: list[str]
    lower: Sequence[str] = ()
    lines: list[Line] = field(default_factory=list)
    corner: str = ACCURACY
    about: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """The distinct notes below the table."""
        return list(dict.fromkeys([*self.about, *(n.note for n in self.lines if n.note)]))

    @property
    def ranked(self) -> bool:
        """Whether a cell is the best of its column."""
        return any(best for _, cells in self.rows for _, best in cells)

    @property
    def unverified(self) -> bool:
        """Whether a cell is marked as unverified."""
        return any(cell.endswith(UNVERIFIED) for line in self.lines for cell in line.cells)

    @property
    def rows(self) -> list[tuple[Line, list[tuple[str, bool]]]]:
        """Each line with its cells, and whether a cell is the best of this run's in its column."""
        best = [self._best(i) for i in range(len(self.columns))]
        return [
            (line, [(cell, line.own and cell in best[i]) for i, cell in enumerate(line.cells)])
            for line in self.lines
        ]

    def _best(self, i: int) -> set[str]:
        """The cells, as they are read, of the best edited model in a column."""
        if self.columns[i] == COEFFICIENT:
            return set()
        known = [line.values[i] for line in self.lines if line.own and line.label != "zero-shot"]
        values = [value for value in known if value is not None]
        if len(values) < 2:
            return set()
        return {percent(min(values) if self.columns[i] in self.lower else max(values))}

    def csv(self) -> str:
        """The table as it is read, as comma-separated values."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([self.corner, *self.columns])
        writer.writerows([line.label, *line.cells] for line in self.lines)
        return file.getvalue()

    def latex(self) -> str:
        """The table as it is read, with the best in bold, for LaTeX's package booktabs."""
        cells = [[line.label, *line.cells] for line in self.lines]
        bold = [[False, *(heavy for _, heavy in row)] for _, row in self.rows]
        return booktabs([self.corner, *self.columns], cells, bold=bold)
