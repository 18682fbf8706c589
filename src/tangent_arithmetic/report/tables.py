"""The tables of a run's page: single tasks, addition, negation, merges; with seeds and papers."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tangent_arithmetic.report.published import COLUMNS, Row, rows
from tangent_arithmetic.run.latex import booktabs
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.present import ADDITION, NEGATION, files_of, with_results
from tangent_arithmetic.run.results import accuracies_path, mean, optional_results, percent, score
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import AT_ONE, siblings

UNVERIFIED = " †"
COEFFICIENT = "coefficient"
SUM = ("mean", "normalised", COEFFICIENT)  # columns of sums and merges, after the tasks
KINDS = ("single", "addition", "negation", "merging")


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: its first column.
        cells: accuracies in percent, formatted.
        values: the fractions of this run's own rows, for the best and for means over seeds.
        published: whether it comes from a paper or another project.
        seeds: whether it is a mean over seeds.
        note: a note below the table.
    """

    label: str
    cells: list[str]
    values: tuple[float | None, ...] = ()
    published: bool = False
    seeds: bool = False
    note: str = ""

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
    """

    name: str
    title: str
    columns: list[str]
    lower: Sequence[str] = ()
    lines: list[Line] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """The distinct notes below the table."""
        return list(dict.fromkeys(line.note for line in self.lines if line.note))

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
        writer.writerow(["test accuracy, %", *self.columns])
        writer.writerows([line.label, *line.cells] for line in self.lines)
        return file.getvalue()

    def latex(self) -> str:
        """The table as it is read, with the best in bold, for LaTeX's package booktabs."""
        cells = [[line.label, *line.cells] for line in self.lines]
        bold = [[False, *(heavy for _, heavy in row)] for _, row in self.rows]
        return booktabs(["test accuracy, %", *self.columns], cells, bold=bold)


def tables_of(run: Run) -> list[Table]:
    """The tables of a run: its own rows, means over seeds where there are several, and papers'."""
    runs = siblings(run)
    at_one = any(_has_at_one(one) for one in (run, *runs))
    found = _own(run, at_one)
    if len(runs) > 1:
        others = [(one.seed, _own(one, at_one)) for one in runs]
        for kind in ("single", "addition", "negation"):
            if found[kind].lines:
                found[kind].lines += _over_seeds(
                    found[kind], {seed: one[kind] for seed, one in others}
                )
    names = {"addition": {"mean": "absolute"}, "negation": {"mean": "target"}}
    names["negation"][found["negation"].columns[-1]] = "control"
    for kind, table in found.items():
        if table.lines and kind in COLUMNS:
            published = rows(kind, str(run.config.model))
            table.lines += [
                _published(row, table.columns, names.get(kind, {})) for row in published
            ]
    return [table for table in found.values() if table.lines]


def _has_at_one(run: Run) -> bool:
    """Whether a sum of a run was evaluated at coefficient 1 on the test splits."""
    return any("test_at_1" in optional_results(p) for p in run.results.glob("*additions*.json"))


def _own(run: Run, at_one: bool) -> dict[str, Table]:
    """The tables with this run's own rows, by `KINDS`; without rows where there are no results.

    Args:
        run: the run.
        at_one: whether the table of sums has the column `AT_ONE`.
    """
    modes = with_results(run.results)
    by_mode = {mode: optional_results(accuracies_path(run, mode)) for mode in modes}
    edited = [mode for mode in modes if MODES[mode].edits]
    tasks = [t for t in run.suite.tasks if any(t in results for results in by_mode.values())]
    return {
        "single": _single(by_mode, tasks),
        "addition": _addition(run, edited, tasks, at_one),
        "negation": _negation(run, edited, tasks),
        "merging": _merging(run, tasks),
    }


def _line(label: str, values: Sequence[float | None]) -> Line:
    return Line(label, [*map(percent, values)], tuple(values))


def _single(by_mode: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Table:
    table = Table("single", "Single-task accuracy", [*tasks, "mean"])
    for mode, results in by_mode.items():
        if any(task in results for task in tasks):
            values = [results.get(task) for task in tasks]
            table.lines.append(_line(MODES[mode].label, [*values, mean(values)]))
    return table


def _addition(run: Run, modes: Sequence[str], tasks: Sequence[str], at_one: bool) -> Table:
    columns = [*tasks, *SUM, *([AT_ONE] if at_one else [])]
    table = Table("addition", "Task addition: the sum of task vectors", columns)
    for mode in modes:
        for path, of in files_of(run.results, mode, ADDITION):
            results = optional_results(path)
            if not {"test", "coefficient"} <= set(results):
                continue
            label = f"{MODES[mode].label}, {of}" if of else MODES[mode].label
            line = _sum(label, results, tasks)
            if at_one:
                one = results.get("test_at_1", {}).get("avg_top1")
                line = replace(line, cells=[*line.cells, percent(one)], values=(*line.values, one))
            table.lines.append(line)
    return table


def _merging(run: Run, tasks: Sequence[str]) -> Table:
    table = Table("merging", "Merging", [*tasks, *SUM])
    for path in sorted(run.results.glob("merging-*.json")):
        results = optional_results(path)
        if "test" in results:
            label = results.get("merge", {}).get("label") or path.stem.removeprefix("merging-")
            table.lines.append(_sum(str(label), results, tasks))
    return table


def _sum(label: str, results: Mapping[str, Any], tasks: Sequence[str]) -> Line:
    """The row of a sum or a merge: accuracies by task, and `SUM`."""
    test, coef = results["test"], results.get("coefficient")
    values = [score(test, task) for task in tasks]
    values += [test.get("avg_top1"), test.get("avg_normalized_top1")]
    cells = [*map(percent, values), "-" if coef is None else f"{coef:g}"]
    return Line(label, cells, (*values, coef))


def _negation(run: Run, modes: Sequence[str], tasks: Sequence[str]) -> Table:
    control = run.control_set
    title = "Task negation: accuracy on the task to forget, and on the control set"
    lower = [*tasks, "mean"]
    table = Table("negation", title, [*lower, f"control {control}"], lower)
    if zeroshot := optional_results(accuracies_path(run, "none")):
        values = [zeroshot.get(task) for task in tasks]
        table.lines.append(_line("zero-shot", [*values, mean(values), zeroshot.get(str(control))]))
    for mode in modes:
        paths = files_of(run.results, mode, NEGATION)
        results = optional_results(paths[0][0]) if paths else {}
        if any(task in results for task in tasks):
            negations = [results.get(task, {}) for task in tasks]
            kept = mean([negation.get("test_control") for negation in negations])
            values = [negation.get("test") for negation in negations]
            table.lines.append(_line(MODES[mode].label, [*values, mean(values), kept]))
    return table if len(table.lines) > 1 else replace(table, lines=[])


def _over_seeds(table: Table, others: Mapping[int, Table]) -> list[Line]:
    """Mean ± standard deviation of each row over the seeds that have it."""
    lines = []
    for label in [line.label for line in table.lines if line.label != "zero-shot"]:
        found = {
            seed: line.values
            for seed, other in others.items()
            for line in other.lines
            if line.label == label and other.columns == table.columns
        }
        if len(found) > 1:
            columns = zip(table.columns, zip(*found.values(), strict=True), strict=True)
            cells = [_spread(column, values) for column, values in columns]
            seeds = f"\u00b1: mean and standard deviation over seeds {', '.join(map(str, found))}."
            lines.append(Line(f"{label}, {len(found)} seeds", cells, seeds=True, note=seeds))
    return lines


def _spread(column: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    factor, digits = (1, 2) if column == COEFFICIENT else (100, 1)
    average, deviation = factor * statistics.fmean(known), factor * statistics.stdev(known)
    return f"{average:.{digits}f} ± {deviation:.{digits}f}"


def _published(row: Row, columns: Sequence[str], names: Mapping[str, str]) -> Line:
    """A published row, in the columns of our table."""
    values = (row.cells.get(names.get(column, column)) for column in columns)
    cells = [f"{v.value:.1f}{'' if v.verified else UNVERIFIED}" if v else "" for v in values]
    note = f"{row.source}: {row.note}." if row.note else ""
    return Line(f"{row.label} ({row.source})", cells, published=True, note=note)
