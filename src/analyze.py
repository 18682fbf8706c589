"""Analyses a run as the papers do: tables, figures and the report page.

NAME is an analysis (single, similarity, disentanglement, negation, subsets, analogies, few), or
"report" for the page with its tangent explorer, or "figures" to draw the tables that are there
again. Without a name all analyses and the page are made. They need the run's checkpoints and its
results: see src/finetune.py and src/eval_*.py. --finetuning-mode narrows them to one mode.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from src import ddp
from src.analysis import analogies, disentanglement, negation, similarity, single, subsets
from src.analysis import explorer as tangent_explorer
from src.analysis.edits import MODES
from src.analysis.figures import plain, save
from src.analysis.report import report_path, write_report
from src.analysis.tables import of_table, read_table, table_path, write_table
from src.args import parse_names, require_mode
from src.errors import UnwritableError, UsageError, entry_point
from src.logs import setup_logging
from src.private import without_home
from src.results import check_targets
from src.runs import announce
from src.settings import results_dir, seed_of, setting, suite_of

logger = logging.getLogger(__name__)

Make = Callable[[Any, Sequence[str]], pd.DataFrame]
Draw = Callable[[pd.DataFrame, Any], Any]
# by name, each a list of tables: its name, what makes it of settings and modes, its figure
ANALYSES: dict[str, list[tuple[str, Make, Draw]]] = {
    "single": [("single", single.table, single.draw)],
    "similarity": [
        ("similarity", similarity.table, similarity.draw),
        ("layers", similarity.layers, similarity.draw_layers),
    ],
    "disentanglement": [("disentanglement", disentanglement.table, disentanglement.draw)],
    "negation": [
        ("negation", negation.curves, negation.draw_curves),
        ("negation_random", negation.against_random, negation.draw_random),
    ],
    "subsets": [("subsets", subsets.table, subsets.draw)],
    "analogies": [("analogies", analogies.table, analogies.draw)],
    "few": [("analogies_few", analogies.with_few_pictures, analogies.draw_few)],
}
FIGURES, REPORT = "figures", "report"
NAMES = (*ANALYSES, FIGURES, REPORT)


def analyze(args: Any, names: Sequence[str] = ()) -> None:
    """Makes analyses, and writes their tables (CSV), provenance and figures, and the report page.

    Args:
        args: settings of the run.
        names: see `NAMES`; without any, all analyses and the explorer are made, and one whose
            checkpoints or results are not there is left out with a warning.
    """
    parts = [part for analysis in names or ANALYSES for part in ANALYSES.get(analysis, ())]
    tables = [table_path(args, name) for name, *_ in parts]
    figures = [figures_dir(args) / f"{path.stem}.png" for path in tables]
    if FIGURES in names:
        figures.append(figures_dir(args) / "single.png")
    check_targets(args, report_path(args), *tables, *figures)
    mode = setting(args, "finetuning_mode")
    modes = MODES if mode is None else (mode,)
    for name, make, draw in parts:
        with _leaving_out(name, not names):
            logger.info("analysis: %s", name)
            start = time.monotonic()
            found = make(args, modes)
            if ddp.is_main_process():
                seconds = time.monotonic() - start
                path = write_table(args, name, found, seconds)
                show(args, name, draw, found)
                logger.info("%s: %.0f s, wrote %s", name, seconds, path)
            ddp.barrier()
    if FIGURES in names and ddp.is_main_process():
        for name, _, draw in (part for analysis in ANALYSES.values() for part in analysis):
            if table_path(args, name).is_file():
                with of_table(args, name):
                    show(args, name, draw, read_table(args, name))
    explored = None
    if REPORT in names or not names:
        with _leaving_out("the explorer", not names):
            explored = tangent_explorer.explore(args, "posthoc" if mode == "posthoc" else "linear")
    path = write_report(args, explored)
    logger.info("wrote %s", path)


@contextlib.contextmanager
def _leaving_out(name: str, wanted: bool) -> Iterator[None]:
    """Warns of an input that is not there instead of stopping, if that is wanted."""
    try:
        yield
    except UsageError as error:
        if not wanted or isinstance(error, UnwritableError):
            raise
        logger.warning("%s is left out: %s", name, error)


def figures_dir(args: Any) -> Path:
    """The folder of the run's figures."""
    return results_dir(args) / "figures"


def show(args: Any, name: str, draw: Draw, table: pd.DataFrame) -> None:
    """Writes the figure of a table."""
    note = f"{setting(args, 'model')}, suite {suite_of(args).name}, seed {seed_of(args)}"
    save(plain(draw, table, args), figures_dir(args), name, without_home(note))


@dataclass(frozen=True)
class Work:
    """What every process of the run does.

    Attributes:
        names: of the analyses; none for all.
    """

    names: tuple[str, ...]

    def __call__(self, args: Any) -> None:
        """Analyses."""
        announce(args, "analyze")
        analyze(args, self.names)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    names, args = parse_names(NAMES, "analysis", argv, __doc__)
    if args.finetuning_mode is not None:
        require_mode(args, "analyze.py", MODES)
    setup_logging()
    ddp.run(Work(tuple(names)), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
