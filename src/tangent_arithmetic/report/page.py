"""The report of a run: one page, offline, with its tables, figures, provenance and explorer.

It is made of the files in the run's results folder alone, and anew after each evaluation. The
tangent explorer takes a pass over the pictures, and is kept from page to page while it is true.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    "disentanglement": "Disentanglement error of pairs of tasks; the frame is where coefficients "
    "are looked for",
    "similarity": "Cosine similarity of the task vectors",
    "layers": "Share of the task vectors' squared norm by layer",
    "negation": "What forgetting costs: the task and the control set along negation",
    "negation_random": "Negation against random vectors of the same norm in each weight",
    "analogies": "Analogies: a task from three others, without its data",
    "analogies_few": "Analogies as a start where there are few pictures of the task",
}


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        label: what it is of.
        cells: accuracies in percent, as text.
        published: whether it comes from a paper or another project.
        note: said below the table.
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
        """What is said below it, once each."""
        return list(dict.fromkeys(line.note for line in self.lines if line.note))

    @property
    def unverified(self) -> bool:
        """Whether a cell carries the mark of figures that were recalled."""
        return any(cell.endswith(UNVERIFIED) for line in self.lines for cell in line.cells)


UNVERIFIED = " †"


def report_path(run: Run) -> Path:
    """The page of a run."""
    return run.results / "report.html"


def write_report(run: Run, explored: str | None = None) -> Path:
    """Writes the page; on the first rank only.

    Args:
        run: the run.
        explored: the tangent explorer to put in, see `report.explorer.explore`; without it
            the page keeps the one that it has, if that is still of these results.
    """
    path = report_path(run)
    if ddp.is_main_process():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(path.parent):
                write_text(path, page_of(run, explored or _kept(run, path)))
    return path


def page_of(run: Run, explored: str | None) -> str:
    """The page."""
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
        logger.warning("its tangent explorer is not kept: %s", error)
        return None
    parts = (explorer.part_of(page, explorer.key_of(run, m), m) for m in linear())
    return next((part for part in parts if part), None)


def tables_of(run: Run) -> list[Table]:
    """Single tasks, addition and negation, by mode, with what is published of the model."""
    model, control = str(run.config.model), run.control
    single, tasks = _single(run, control)
    found = [single, _addition(run, tasks), _negation(run, tasks, control)]
    places: list[dict[str, str]] = [
        {},
        {"mean": "absolute"},
        {"mean": "target", f"control {control}": "control"},
    ]
    for kind, table, names in zip(("single", "addition", "negation"), found, places, strict=True):
        if table.lines:
            table.lines += [_published(row, table.columns, names) for row in rows(kind, model)]
    return found


def _single(run: Run, control: str) -> tuple[Table, list[str]]:
    """The table of single tasks, and the tasks that there are results of."""
    held = {mode: results_if_any(accuracies_path(run, mode)) for mode in MODES}
    known = [t for t in run.suite.tasks if any(t in results for results in held.values())]
    table = Table("Single-task accuracy", [*known, "mean"])
    for mode, results in held.items():
        if any(task in results for task in known):
            values = [results.get(task) for task in known]
            table.lines.append(
                Line(MODES[mode].label, [*map(percent, values), percent(mean(values))])
            )
    return table, known


def _addition(run: Run, tasks: Sequence[str]) -> Table:
    columns = [*tasks, "mean", "normalised", "coefficient"]
    table = Table("Task addition: the sum of task vectors", columns)
    for mode in edited():
        for path in sorted(run.results.glob(f"{MODES[mode].prefix}additions*.json")):
            results = results_if_any(path)
            if not {"test", "coefficient"} <= set(results):
                continue
            of = path.stem.partition("-")[2]
            test = results["test"]
            values = [test.get(f"{task}:top1") for task in tasks]
            means = [test.get("avg_top1"), test.get("avg_normalized_top1")]
            cells = [*map(percent, [*values, *means]), f"{results['coefficient']:g}"]
            table.lines.append(
                Line(f"{MODES[mode].label}, {of}" if of else MODES[mode].label, cells)
            )
    return table


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
    """A row of another's figures, in the columns of our table."""
    cells = []
    for column in columns:
        cell = row.cells.get(names.get(column, column))
        mark = "" if cell is None or cell.verified else UNVERIFIED
        cells.append("" if cell is None else f"{cell.value:.1f}{mark}")
    note = f"{row.source}: {row.note}." if row.note else ""
    return Line(f"{row.label} ({row.source})", cells, published=True, note=note)


def _figures(folder: Path) -> Iterable[dict[str, str]]:
    """The figures of a folder, the analyses' first, as data in the page."""
    paths = {path.stem: path for path in sorted(folder.glob("*.png"))}
    for name in [*(n for n in CAPTIONS if n in paths), *(n for n in paths if n not in CAPTIONS)]:
        try:
            image = base64.b64encode(paths[name].read_bytes()).decode()
        except OSError as error:
            logger.warning("%s is left out of the report: %s", paths[name], error.strerror)
            continue
        yield {"caption": CAPTIONS.get(name, name), "source": f"data:image/png;base64,{image}"}


def _origins(folder: Path) -> Iterable[dict[str, str]]:
    """What made each file of results."""
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
