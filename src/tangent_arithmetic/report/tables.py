"""The tables of a run's page: single tasks, addition, negation, merges; with seeds and papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tangent_arithmetic.report.certified import certified_tables
from tangent_arithmetic.report.published import COLUMNS, EIGHT, Row, rows
from tangent_arithmetic.report.solved import Solved, heat_maps, numbers, solved_of
from tangent_arithmetic.report.table import COEFFICIENT, UNVERIFIED, Line, Table
from tangent_arithmetic.run.modes import MODES, in_order
from tangent_arithmetic.run.present import (
    ADDITION,
    NEGATION,
    files_of,
    recorded_mode,
    superseded,
    with_results,
)
from tangent_arithmetic.run.results import accuracies_path, optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import AT_ONE, siblings, spread
from tangent_arithmetic.run.tables import mean, percent, score

SUM = ("mean", "normalised", COEFFICIENT)  # columns of sums and merges, after the tasks
EXACT = ("exact", "control at exact")  # columns of negations, after the control set


def tables_of(run: Run) -> list[Table]:
    """The tables of a run: its own rows, means over seeds where there are several, and papers'."""
    runs = siblings(run)
    shown = Columns(
        at_one=any(map(_has_at_one, (run, *runs))), exact=any(map(_has_exact, (run, *runs)))
    )
    found = _own(run, shown)
    if len(runs) > 1:
        others = [(one.seed, _own(one, shown)) for one in runs]
        for kind in ("single", "addition", "negation"):
            if found[kind].lines:
                found[kind].lines += _over_seeds(
                    found[kind], {seed: one[kind] for seed, one in others}
                )
    names = {"addition": {"mean": "absolute"}, "negation": {"mean": "target"}}
    names["negation"][f"control {run.control_set}"] = "control"
    for kind, table in found.items():
        if table.lines and kind in COLUMNS and set(run.tasks) == set(EIGHT):
            published = rows(kind, str(run.config.model))
            table.lines += [
                _published(row, table.columns, names.get(kind, {})) for row in published
            ]
    maps, certified = heat_maps(solved_of(run.results)), certified_tables(run.results)
    ordered = [found["single"], found["addition"], *maps, found["negation"], *certified]
    return [table for table in (*ordered, found["merging"]) if table.lines]


@dataclass(frozen=True)
class Columns:
    """Columns that only newer results fill.

    Attributes:
        at_one: the sum at coefficient 1, `AT_ONE`.
        exact: the exact optimum of a negation, `EXACT`.
    """

    at_one: bool
    exact: bool


def _has_at_one(run: Run) -> bool:
    """Whether a sum of a run was evaluated at coefficient 1 on the test splits."""
    return any("test_at_1" in optional_results(p) for p in run.results.glob("*additions*.json"))


def _has_exact(run: Run) -> bool:
    """Whether a negation of a run has an exact optimum."""
    files = (optional_results(path) for path in run.results.glob("*negations.json"))
    return any(_at_exact(of_task, "test") is not None for f in files for of_task in f.values())


def _at_exact(negation: object, key: str) -> float | None:
    """An accuracy at the exact optimum of a task's negation; None if it has none."""
    exact = negation.get("exact") if isinstance(negation, dict) else None
    return numbers(exact).get(key)


def _own(run: Run, shown: Columns) -> dict[str, Table]:
    """The tables with this run's own rows, by kind; without rows where there are no results."""
    modes = with_results(run.results)
    by_mode = {mode: optional_results(accuracies_path(run, mode)) for mode in modes}
    edited = [mode for mode in modes if MODES[mode].edits]
    tasks = [t for t in run.suite.tasks if any(t in results for results in by_mode.values())]
    return {
        "single": _single(by_mode, tasks),
        "addition": _addition(run, by_mode, tasks, shown.at_one),
        "negation": _negation(run, edited, tasks, shown.exact),
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


def _addition(
    run: Run, by_mode: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], at_one: bool
) -> Table:
    columns = [*tasks, *SUM, *([AT_ONE] if at_one else [])]
    table = Table("addition", "Task addition: the sum of task vectors", columns)
    solved = solved_of(run.results)
    names = in_order({*by_mode, *(one.mode.name for one in solved)})
    for mode in (name for name in names if MODES[name].edits):
        for path, of in files_of(run.results, mode, ADDITION):
            results = optional_results(path)
            if not {"test", "coefficient"} <= set(results):
                continue
            line = _sum(f"{MODES[mode].label}, {of}" if of else MODES[mode].label, results, tasks)
            if at_one:
                one = results.get("test_at_1", {}).get("avg_top1")
                line = replace(line, cells=[*line.cells, percent(one)], values=(*line.values, one))
            table.lines.append(_checked(line, run, results, mode, "add"))
        singles = by_mode.get(mode, {})
        own, every = [one for one in solved if one.mode.name == mode], list(run.suite.tasks)
        table.lines += [_solved(one, singles, table.columns, every) for one in own]
    return table


def _checked(line: Line, run: Run, results: Mapping[str, Any], mode: str, made_by: str) -> Line:
    """A row of results; without its values if they are of earlier checkpoints than single tasks."""
    origin = results.get("provenance", {})
    return _blank(line, made_by) if superseded(run.results, origin, mode) else line


def _blank(line: Line, made_by: str) -> Line:
    note = f"{line.label}: of earlier checkpoints than the single tasks; run `{made_by}` again."
    cells, values = ["-"] * len(line.cells), (None,) * len(line.cells)
    return replace(line, cells=cells, values=values, note=note)


def _solved(
    one: Solved, singles: Mapping[str, Any], columns: Sequence[str], all_tasks: Sequence[str]
) -> Line:
    """The row of a sum with solved coefficients; its normalised mean needs all single tasks."""
    of = "" if set(one.test) == set(all_tasks) else f" {'+'.join(one.test)},"
    shares = [v / singles[t] if singles.get(t) else None for t, v in one.test.items()]
    means = {"mean": mean([*one.test.values()]), "normalised": mean(shares)}
    values = [one.test.get(column, means.get(column)) for column in columns]
    cells = [*map(percent, values)]
    cells[columns.index(COEFFICIENT)] = f"{len(one.coefficients)} solved"
    line = Line(f"{one.mode.label},{of} solved: {one.name}", cells, tuple(values))
    return _blank(line, "combine") if one.earlier else line


def _merging(run: Run, tasks: Sequence[str]) -> Table:
    table = Table("merging", "Merging", [*tasks, *SUM])
    for path in sorted(run.results.glob("merging-*.json")):
        results = optional_results(path)
        if "test" in results:
            label = results.get("merge", {}).get("label") or path.stem.removeprefix("merging-")
            line = _sum(str(label), results, tasks)
            if mode := recorded_mode(results.get("provenance", {})):  # none of models of several
                line = _checked(line, run, results, mode.name, "merge")
            table.lines.append(line)
    return table


def _sum(label: str, results: Mapping[str, Any], tasks: Sequence[str]) -> Line:
    """The row of a sum or a merge: accuracies by task, and `SUM`."""
    test, coef = results["test"], results.get("coefficient")
    values = [score(test, task) for task in tasks]
    values += [test.get("avg_top1"), test.get("avg_normalized_top1")]
    cells = [*map(percent, values), "-" if coef is None else f"{coef:g}"]
    return Line(label, cells, (*values, coef))


def _negation(run: Run, modes: Sequence[str], tasks: Sequence[str], exact: bool) -> Table:
    control, further = run.control_set, EXACT if exact else ()
    title = "Task negation: accuracy on the task to forget, and on the control set"
    columns = [*tasks, "mean", f"control {control}", *further]
    table = Table("negation", title, columns, [*tasks, "mean", EXACT[0]])
    if zeroshot := optional_results(accuracies_path(run, "none")):
        values = [zeroshot.get(task) for task in tasks]
        values += [mean(values), zeroshot.get(str(control)), *(None for _ in further)]
        table.lines.append(_line("zero-shot", values))
    for mode in modes:
        paths = files_of(run.results, mode, NEGATION)
        results = optional_results(paths[0][0]) if paths else {}
        if any(task in results for task in tasks):
            negations = [results.get(task, {}) for task in tasks]
            values = [negation.get("test") for negation in negations]
            values += [mean(values), mean([one.get("test_control") for one in negations])]
            for _, key in zip(further, ("test", "test_control"), strict=False):
                values.append(mean([_at_exact(negation, key) for negation in negations]))
            other = _control_of(results)
            further_name = "" if other in (None, control) else f", control {other}"
            line = _line(f"{MODES[mode].label}{further_name}", values)
            table.lines.append(_checked(line, run, results, mode, "negate"))
    return table if len(table.lines) > 1 else replace(table, lines=[])


def _control_of(results: Mapping[str, Any]) -> str | None:
    """The control set that negations record; None if they do not."""
    origin = results.get("provenance")
    recorded = origin.get("control") if isinstance(origin, dict) else None
    return recorded.get("name") if isinstance(recorded, dict) else None


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
    return spread(values, *((1, 2) if column == COEFFICIENT else (100, 1)))


def _published(row: Row, columns: Sequence[str], names: Mapping[str, str]) -> Line:
    """A published row, in the columns of our table."""
    values = (row.cells.get(names.get(column, column)) for column in columns)
    cells = [f"{v.value:.1f}{'' if v.verified else UNVERIFIED}" if v else "" for v in values]
    note = f"{row.source}: {row.note}." if row.note else ""
    return Line(f"{row.label} ({row.source})", cells, published=True, note=note)
