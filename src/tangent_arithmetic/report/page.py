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
from tangent_arithmetic.report.published import COLUMNS, Row, rows
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import MODES, edited, linear
from tangent_arithmetic.run.results import accuracies_path, mean, optional_results, percent
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.atomic import disk_errors, write_text
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.processes import one_at_a_time
from tangent_arithmetic.storage.reading import read_text

logger = logging.getLogger(__name__)

CAPTIONS = {
    "single": "Single tasks: standard fine-tuning, its post-hoc linearisation, linear fine-tuning",
    "subsets": "Sums of task vectors over subsets of the tasks, by their number",
    "disentanglement": "Disentanglement error of pairs of tasks; frame: search range",
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
        label: its first column.
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
SUM = ("mean", "normalised", "coefficient")  # columns of sums and merges, after the tasks


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
        tables=tables_of(run),
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
    by_mode = {mode: optional_results(accuracies_path(run, mode)) for mode in MODES}
    tasks = [t for t in run.suite.tasks if any(t in results for results in by_mode.values())]
    control = f"control {run.control}"
    tables = {  # kind -> table, and its columns' names in published rows
        "single": (_single(by_mode, tasks), {}),
        "addition": (_addition(run, tasks), {"mean": "absolute"}),
        "negation": (_negation(run, tasks), {"mean": "target", control: "control"}),
        "merging": (_merging(run, tasks), {}),
    }
    for kind, (table, names) in tables.items():
        if table.lines and kind in COLUMNS:
            published = rows(kind, str(run.config.model))
            table.lines += [_published(row, table.columns, names) for row in published]
    return [table for table, _ in tables.values() if table.lines]


def _single(by_mode: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Table:
    table = Table("Single-task accuracy", [*tasks, "mean"])
    for mode, results in by_mode.items():
        if any(task in results for task in tasks):
            values = [results.get(task) for task in tasks]
            table.lines.append(Line(MODES[mode].label, [*map(percent, [*values, mean(values)])]))
    return table


def _addition(run: Run, tasks: Sequence[str]) -> Table:
    table = Table("Task addition: the sum of task vectors", [*tasks, *SUM])
    for mode in edited():
        for path in sorted(run.results.glob(f"{MODES[mode].prefix}additions*.json")):
            results = optional_results(path)
            if not {"test", "coefficient"} <= set(results):
                continue
            of = path.stem.partition("-")[2]
            label = f"{MODES[mode].label}, {of}" if of else MODES[mode].label
            table.lines.append(Line(label, _sum_cells(results, tasks)))
    return table


def _merging(run: Run, tasks: Sequence[str]) -> Table:
    table = Table("Merging", [*tasks, *SUM])
    for path in sorted(run.results.glob("merging-*.json")):
        results = optional_results(path)
        if "test" in results:
            label = results.get("merge", {}).get("label") or path.stem.removeprefix("merging-")
            table.lines.append(Line(str(label), _sum_cells(results, tasks)))
    return table


def _sum_cells(results: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """The cells of a sum or a merge: accuracies by task, and `SUM`."""
    test, coef = results["test"], results.get("coefficient")
    values = [test.get(f"{task}:top1") for task in tasks]
    means = [test.get("avg_top1"), test.get("avg_normalized_top1")]
    return [*map(percent, [*values, *means]), "-" if coef is None else f"{coef:g}"]


def _negation(run: Run, tasks: Sequence[str]) -> Table:
    title = "Task negation: accuracy on the task to forget, and on the control set"
    table = Table(title, [*tasks, "mean", f"control {run.control}"])

    def add(mode: str, values: list[Any], control: Any) -> None:
        cells = [*map(percent, [*values, mean(values), control])]
        table.lines.append(Line(MODES[mode].label, cells))

    if zeroshot := optional_results(accuracies_path(run, "none")):
        add("none", [zeroshot.get(task) for task in tasks], zeroshot.get(run.control))
    for mode in edited():
        results = optional_results(run.results / f"{MODES[mode].prefix}negations.json")
        if any(task in results for task in tasks):
            negations = [results.get(task, {}) for task in tasks]
            kept = mean([negation.get("test_control") for negation in negations])
            add(mode, [negation.get("test") for negation in negations], kept)
    return table if len(table.lines) > 1 else Table("", [])


def _published(row: Row, columns: Sequence[str], names: Mapping[str, str]) -> Line:
    """A published row, in the columns of our table."""
    values = (row.cells.get(names.get(column, column)) for column in columns)
    cells = [f"{v.value:.1f}{'' if v.verified else UNVERIFIED}" if v else "" for v in values]
    note = f"{row.source}: {row.note}." if row.note else ""
    return Line(f"{row.label} ({row.source})", cells, published=True, note=note)


def _figures(folder: Path) -> Iterable[dict[str, str]]:
    """The figures in a folder as data URLs, in the order of `CAPTIONS`, then others by name."""
    names = [*CAPTIONS]
    paths = sorted(folder.glob("*.png"))
    for path in sorted(paths, key=lambda p: names.index(p.stem) if p.stem in names else len(names)):
        try:
            image = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            logger.warning("%s is left out of the report: %s", path, error.strerror)
            continue
        caption = CAPTIONS.get(path.stem, path.stem)
        yield {"caption": caption, "source": f"data:image/png;base64,{image}"}


def _origins(folder: Path) -> Iterable[dict[str, str]]:
    """The provenance of each file of results."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("analysis/*.json")]):
        results = optional_results(path)
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
