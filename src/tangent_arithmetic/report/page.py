"""The report of a run: one offline page with tables, figures, provenance and explorer.

It is built from the files in the run's results folder, after each evaluation. The tangent explorer
needs a pass over the images, and is reused until the results change.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tangent_arithmetic.report import explorer
from tangent_arithmetic.report.published import Row, rows
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES, edited, linear
from tangent_arithmetic.run.results import accuracies_path, mean, percent, results_if_any
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import disk_errors, write_text
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.processes import one_at_a_time
from tangent_arithmetic.storage.reading import read_text

logger = logging.getLogger(__name__)

CAPTIONS = {
    "single": "One task alone: standard fine-tuning against its linearisation and linear "
    "fine-tuning",
    "subsets": "Sums of task vectors over subsets of the tasks, by their number",
    "disentanglement": "Disentanglement error of pairs of tasks; the frame is the search range of "
    "coefficients",
    "similarity": "Cosine similarity of the task vectors",
    "layers": "Share of the task vectors' squared norm by layer",
    "negation": "The cost of forgetting: the task and the control set along negation",
    "negation_random": "Negation against random vectors of the same norm in each weight",
    "analogies": "Analogies: a task from three others, without its data",
    "analogies_few": "Analogies as a starting point for few-shot fine-tuning",
}


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: the label of the row.
        cells: accuracies in percent, formatted.
        published: whether it comes from a paper or another project.
        note: a note below the table.
    """

    label: str
    cells: list[str]
    published: bool = False
    note: str = ""


@dataclass
class Table:
    """A table of the page; `columns` are those after the label."""

    title: str
    columns: list[str]
    lines: list[Line] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """The distinct notes below the table."""
        return list(dict.fromkeys(line.note for line in self.lines if line.note))

    @property
    def unverified(self) -> bool:
        """Whether a cell is marked as unverified."""
        return any(cell.endswith(UNVERIFIED) for line in self.lines for cell in line.cells)


UNVERIFIED = " †"


def report_path(run: Run) -> Path:
    """The path of a run's page."""
    return run.results / "report.html"


def write_report(run: Run, explored: str | None = None) -> Path:
    """Writes the page, on rank 0.

    Args:
        run: the run.
        explored: the tangent explorer, see `report.explorer.explore`; None to reuse the one in the
            existing page if it belongs to the current results.
    """
    path = report_path(run)
    if ddp.is_main_process():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(path.parent):
                write_text(path, page_of(run, explored or _kept(run, path)))
    return path


def page_of(run: Run, explored: str | None) -> str:
    """The HTML of the page."""
    seed = "" if run.config.seed is None else f", seed {run.seed}"
    return explorer.asset("report.html.j2").render(
        title=without_home(f"{run.config.model}, suite {run.suite.name}{seed}"),
        sample=run.config.sample,
        style=explorer.text("report.css"),
        tables=[table for table in tables_of(run) if table.lines],
        explorer=explored,
        explorer_command=without_home(command("analyze", run, name="report")),
        figures=list(_figures(run.results / "figures")),
        origins=without_home(list(_origins(run.results))),
        unverified=UNVERIFIED.strip(),
    )


def _kept(run: Run, path: Path) -> str | None:
    try:
        page = read_text(path)
    except MissingFileError:
        return None
    except UsageError as error:
        logger.warning("its tangent explorer is not reused: %s", error)
        return None
    parts = (explorer.part_of(page, explorer.key_of(run, m), m) for m in linear())
    return next((part for part in parts if part), None)


def tables_of(run: Run) -> list[Table]:
    """Tables of single tasks, addition, negation and merges, with published rows of the model."""
    model, control = str(run.config.model), run.control
    single, tasks = _single(run, control)
    tables = {  # kind -> table, and its columns' names in published rows
        "single": (single, {}),
        "addition": (_addition(run, tasks), {"mean": "absolute"}),
        "negation": (
            _negation(run, tasks, control),
            {"mean": "target", f"control {control}": "control"},
        ),
    }
    for kind, (table, names) in tables.items():
        if table.lines:
            table.lines += [_published(row, table.columns, names) for row in rows(kind, model)]
    merging = _merging(run, tasks)
    return [*(table for table, _ in tables.values()), *([merging] if merging.lines else [])]


def _single(run: Run, control: str) -> tuple[Table, list[str]]:
    """The table of single tasks, and the tasks with results."""
    by_mode = {mode: results_if_any(accuracies_path(run, mode)) for mode in MODES}
    tasks = [t for t in run.suite.tasks if any(t in results for results in by_mode.values())]
    table = Table("Single-task accuracy", [*tasks, "mean"])
    for mode, results in by_mode.items():
        if any(task in results for task in tasks):
            values = [results.get(task) for task in tasks]
            table.lines.append(
                Line(MODES[mode].label, [*map(percent, values), percent(mean(values))])
            )
    return table, tasks


def _addition(run: Run, tasks: Sequence[str]) -> Table:
    columns = [*tasks, "mean", "normalised", "coefficient"]
    table = Table("Task addition: the sum of task vectors", columns)
    for mode in edited():
        for path in sorted(run.results.glob(f"{MODES[mode].prefix}additions*.json")):
            results = results_if_any(path)
            if not {"test", "coefficient"} <= set(results):
                continue
            of = path.stem.partition("-")[2]
            label = f"{MODES[mode].label}, {of}" if of else MODES[mode].label
            table.lines.append(Line(label, _sum_cells(results, tasks)))
    return table


def _merging(run: Run, tasks: Sequence[str]) -> Table:
    table = Table("Merging", [*tasks, "mean", "normalised", "coefficient"])
    for path in sorted(run.results.glob("merging-*.json")):
        results = results_if_any(path)
        if "test" in results:
            label = results.get("merge", {}).get("label") or path.stem.removeprefix("merging-")
            table.lines.append(Line(str(label), _sum_cells(results, tasks)))
    return table


def _sum_cells(results: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """Accuracies by task, their means, and the coefficient of a sum or a merge."""
    test, coef = results["test"], results.get("coefficient")
    values = [test.get(f"{task}:top1") for task in tasks]
    means = [test.get("avg_top1"), test.get("avg_normalized_top1")]
    return [*map(percent, [*values, *means]), "-" if coef is None else f"{coef:g}"]


def _negation(run: Run, tasks: Sequence[str], control: str) -> Table:
    table = Table(
        "Task negation: accuracy on the task to forget, and on the control set",
        [*tasks, "mean", f"control {control}"],
    )
    zeroshot = results_if_any(accuracies_path(run, "none"))
    if zeroshot:
        values = [zeroshot.get(task) for task in tasks]
        cells = [*map(percent, [*values, mean(values), zeroshot.get(control)])]
        table.lines.append(Line(MODES["none"].label, cells))
    for mode in edited():
        results = results_if_any(run.results / f"{MODES[mode].prefix}negations.json")
        if any(task in results for task in tasks):
            values = [results.get(task, {}).get("test") for task in tasks]
            kept = mean([results.get(task, {}).get("test_control") for task in tasks])
            cells = [*map(percent, [*values, mean(values), kept])]
            table.lines.append(Line(MODES[mode].label, cells))
    return table if len(table.lines) > 1 else Table("", [])


def _published(row: Row, columns: Sequence[str], names: Mapping[str, str]) -> Line:
    """A published row, in the columns of our table."""
    cells = []
    for column in columns:
        cell = row.cells.get(names.get(column, column))
        mark = "" if cell is None or cell.verified else UNVERIFIED
        cells.append("" if cell is None else f"{cell.value:.1f}{mark}")
    note = f"{row.source}: {row.note}." if row.note else ""
    return Line(f"{row.label} ({row.source})", cells, published=True, note=note)


def _figures(folder: Path) -> Iterable[dict[str, str]]:
    """The figures of a folder as data URLs, those of the analyses first."""
    paths = {path.stem: path for path in sorted(folder.glob("*.png"))}
    for name in [*(n for n in CAPTIONS if n in paths), *(n for n in paths if n not in CAPTIONS)]:
        try:
            image = base64.b64encode(paths[name].read_bytes()).decode()
        except OSError as error:
            logger.warning("%s is left out of the report: %s", paths[name], error.strerror)
            continue
        yield {"caption": CAPTIONS.get(name, name), "source": f"data:image/png;base64,{image}"}


def _origins(folder: Path) -> Iterable[dict[str, str]]:
    """The provenance of each file of results."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("analysis/*.json")]):
        results = results_if_any(path)
        origin = results.get("provenance", results)
        versions = origin.get("versions", {})
        yield {
            "file": path.relative_to(folder).as_posix(),
            "command": " ".join(origin.get("argv", ())),
            "commit": (origin.get("commit") or "unknown")[:12],
            "machine": f"{origin.get('machine', 'unknown')}, {origin.get('device', '')}",
            "seconds": f"{origin.get('seconds', '')}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
