"""Analyses a run as the papers do: tables, figures and the report page.

    python src/analyze.py [ANALYSIS ...] [flags]

Without a name all analyses are made. They need the run's checkpoints and its results: see
src/finetune.py and src/eval_*.py. --finetuning-mode narrows them to one mode.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from src import ddp
from src.analysis import analogies, disentanglement, negation, similarity, single, subsets
from src.analysis import explorer as tangent_explorer
from src.analysis.edits import MODES
from src.analysis.figures import plain, save
from src.analysis.report import write_report
from src.analysis.tables import write_table
from src.args import parse_arguments, require_mode
from src.errors import entry_point, unknown
from src.logs import setup_logging
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


REPORT = "report"


def analyze(args: Any, names: Sequence[str]) -> None:
    """Makes these analyses, and writes their tables (CSV), provenance and figures.

    The report page is made anew; "report" gives it a tangent explorer.
    """
    mode = setting(args, "finetuning_mode")
    modes = MODES if mode is None else (mode,)
    note = f"{setting(args, 'model')}, suite {suite_of(args).name}, seed {seed_of(args)}"
    for name, make, draw in (part for analysis in names for part in ANALYSES.get(analysis, ())):
        logger.info("analysis: %s", name)
        start = time.monotonic()
        found = make(args, modes)
        if ddp.is_main_process():
            seconds = time.monotonic() - start
            path = write_table(args, name, found, seconds)
            save(plain(draw, found, args), results_dir(args) / "figures", name, note)
            logger.info("%s: %.0f s, wrote %s", name, seconds, path)
        ddp.barrier()
    explored = None
    if REPORT in names:
        explored = tangent_explorer.explore(args, "posthoc" if mode == "posthoc" else "linear")
    path = write_report(args, explored)
    logger.info("wrote %s", path)


@dataclass(frozen=True)
class Work:
    """What every process of the run does.

    Attributes:
        names: of the analyses.
    """

    names: tuple[str, ...]

    def __call__(self, args: Any) -> None:
        """Analyses."""
        announce(args, "analyze")
        analyze(args, self.names)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = list(sys.argv[1:] if argv is None else argv)
    names = []
    while words and not words[0].startswith("-"):
        names.append(words.pop(0))
    for name in names:
        if name not in (*ANALYSES, REPORT):
            raise unknown("analysis", name, [*ANALYSES, REPORT])
    args = parse_arguments(words, __doc__)
    if args.finetuning_mode is not None:
        require_mode(args, "analyze.py", MODES)
    setup_logging()
    ddp.run(Work(tuple(names) or (*ANALYSES, REPORT)), args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
