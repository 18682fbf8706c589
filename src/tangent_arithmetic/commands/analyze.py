"""Runs the papers' analyses of a run: tables, figures and the report page.

NAME is an analysis (single, similarity, interference, disentanglement, negation, subsets, fronts,
analogies, few, kernel, cka, ensembles, seeds), "report" for the page with its tangent explorer, or
"figures" to redraw the figures of existing tables. The default is all analyses and the page. They
need the run's checkpoints and results, see src/finetune.py and src/eval_*.py. The modes are those
with checkpoints, or those of --modes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis import (
    analogies,
    baselines,
    cka,
    disentanglement,
    ensembles,
    fronts,
    interference,
    kernel,
    negation,
    seeds,
    similarity,
    single,
    subsets,
)
from tangent_arithmetic.analysis.figures import overview, write
from tangent_arithmetic.analysis.tables import (
    current,
    of_table,
    read_table,
    table_path,
    write_latex,
    write_table,
)
from tangent_arithmetic.report import explorer as tangent_explorer
from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.models import announce
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.present import NEGATION, SINGLE, chosen, files_of
from tangent_arithmetic.run.results import check_targets
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import collect, overview_path, summarised
from tangent_arithmetic.run.tracking import tracked
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UnwritableError, UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.private import without_home

logger = logging.getLogger(__name__)

Make = Callable[[Run, Sequence[str]], pd.DataFrame]
Draw = Callable[[pd.DataFrame, Run], Any]
# by name of the analysis, its tables: name, function of a run and modes, function of its figure
ANALYSES: dict[str, list[tuple[str, Make, Draw]]] = {
    "single": [("single", single.table, single.draw)],
    "similarity": [
        ("similarity", similarity.table, similarity.draw),
        ("layers", similarity.layers, similarity.draw_layers),
    ],
    "interference": [("interference", interference.table, interference.draw)],
    "disentanglement": [
        ("disentanglement", disentanglement.table, disentanglement.draw),
        ("xi", disentanglement.xi, disentanglement.draw_xi),
    ],
    "negation": [
        ("negation", negation.curves, negation.draw_curves),
        ("negation_random", baselines.table, baselines.draw),
    ],
    "subsets": [("subsets", subsets.table, subsets.draw)],
    "fronts": [("fronts", fronts.table, fronts.draw)],
    "analogies": [("analogies", analogies.table, analogies.draw)],
    "few": [("analogies_few", analogies.with_few_images, analogies.draw_few)],
    "kernel": [("kernel", kernel.table, kernel.draw)],
    "cka": [("cka", cka.table, cka.draw)],
    "ensembles": [("ensembles", ensembles.table, ensembles.draw)],
    "seeds": [("seeds", seeds.table, seeds.draw)],
}
FIGURES, REPORT = "figures", "report"
NEEDS = {
    "negation": NEGATION,
    "single": SINGLE,
    "subsets": SINGLE,
}  # results that an analysis reads of each mode
NAMES = (*ANALYSES, FIGURES, REPORT)


def analyze(run: Run, names: Sequence[str] = ()) -> None:
    """Runs analyses and writes their tables (CSV), provenance, figures and the report page.

    Args:
        run: the run.
        names: see `NAMES`. Empty for all analyses and the explorer; those whose checkpoints or
            results are missing are then skipped with a warning.
    """
    parts = [
        (analysis, *part) for analysis in names or ANALYSES for part in ANALYSES.get(analysis, ())
    ]
    tables = [table_path(run, name) for _, name, *_ in parts]
    first = [table_path(run, "single").stem] if FIGURES in names else []
    stems = [path.stem for path in tables] + first
    folder = run.results / "figures" / ("paper" if run.config.style == "paper" else "")
    figures = [folder / f"{stem}.png" for stem in stems]
    check_targets(run, report_path(run), *tables, *figures)
    modes = chosen(run) if parts or REPORT in names or not names else ()
    for analysis, name, make, draw in parts:
        with _optional(name, not names):
            logger.info("analysis: %s", name)
            start = time.monotonic()
            table = make(run, evaluated(run, analysis, modes))
            if ddp.is_main_process():
                seconds = time.monotonic() - start
                path = write_table(run, name, table, seconds)
                show(run, name, draw, read_table(run, name))
                logger.info("%s: %.0f s, wrote %s", name, seconds, path)
            ddp.barrier()
    if FIGURES in names and ddp.is_main_process():
        for name, _, draw in (part for analysis in ANALYSES.values() for part in analysis):
            if table_path(run, name).is_file():
                table = read_table(run, name)
                try:
                    table = current(run, name, table)
                except UsageError as error:
                    logger.warning("%s is not drawn: %s", name, error)
                    continue
                with of_table(run, name):
                    show(run, name, draw, table)
                    write_latex(run, name, table)
        redraw_overview(run)
    explored = None
    if REPORT in names or not names:
        with _optional("the explorer", not names):
            explored = tangent_explorer.explore(run, explored_mode(run, modes))
    logger.info("wrote %s", write_report(run, explored))


def evaluated(run: Run, analysis: str, modes: Sequence[str]) -> Sequence[str]:
    """The modes with the results that an analysis reads; all of them if none has, or one is named.

    The analysis then says which command makes the results.
    """
    kind = NEEDS.get(analysis)
    if kind is None or run.config.modes or run.config.finetuning_mode is not None:
        return modes
    found = [mode for mode in modes if files_of(run.results, mode, kind)]
    if found and (missing := [mode for mode in modes if mode not in found]):
        logger.info("%s: no results of %s, left out", analysis, ", ".join(missing))
    return found or modes


def explored_mode(run: Run, modes: Sequence[str]) -> str:
    """The mode of the explorer: the first linear one, with results if one has; "linear" if none."""
    linear = [mode for mode in modes if MODES[mode].linear]
    known = [mode for mode in linear if files_of(run.results, mode, SINGLE)]
    return next(iter([*known, *linear]), "linear")


@contextlib.contextmanager
def _optional(name: str, optional: bool) -> Iterator[None]:
    """Turns the error of a missing input into a warning, if `optional`."""
    try:
        yield
    except UsageError as error:
        if not optional or isinstance(error, UnwritableError):
            raise
        logger.warning("%s is left out: %s", name, error)


def show(run: Run, name: str, draw: Draw, table: pd.DataFrame) -> None:
    """Draws a table and writes its figure, in style "paper" beside that for the screen."""
    of = f"{seeds.seeds_of(run, table)}{seeds.examples(run, name)}"
    note = f"{run.config.model}, suite {run.suite.name}, {of}"
    place: dict[str, Any] = {
        "folder": run.results / "figures",
        "stem": table_path(run, name).stem,
        "note": without_home(note),
    }
    write(draw, table, run, **place, style=run.config.style)


def redraw_overview(run: Run) -> None:
    """Draws the figure of the suite's summary again, if there is one, from the runs' results."""
    if runs := summarised(run):
        overview(runs[0], collect(runs), overview_path(run))


def work(names: tuple[str, ...], run: Run) -> None:
    """Runs the analyses, in every process of the run."""
    announce(run, "analyze")
    with tracked(run, "analysis") as tracker:
        analyze(run, names)
        tracker.show("report", report_path(run))
        for path in sorted((run.results / "figures").glob("*.png")):
            tracker.show(f"figures/{path.stem}", path)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and runs the analyses."""
    names, args = parse_command("analyze", argv, __doc__)
    setup_logging()
    start(functools.partial(work, tuple(names)), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
