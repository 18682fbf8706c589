"""Solves for the coefficients of task vectors, by task, layer or tensor.

Coefficients are solved on validation pictures, accuracies are of the test splits. Writes a results
file, and the merged model as a checkpoint. See docs/solving.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tangent_arithmetic.arithmetic.solving.combining import Settings
from tangent_arithmetic.arithmetic.solving.groups import check_grouping
from tangent_arithmetic.commands.combining.flags import settings_of, slug
from tangent_arithmetic.commands.combining.negations import negation_table, negations
from tangent_arithmetic.commands.combining.sums import (
    account,
    checkpoint_path,
    combination,
    combination_table,
    save,
)
from tangent_arithmetic.report.page import report_path, write_report
from tangent_arithmetic.run.checks import parse_command
from tangent_arithmetic.run.models import announce
from tangent_arithmetic.run.results import check_targets, write_merged, write_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging


def work(run: Run) -> None:
    """Solves, evaluates, writes and prints."""
    announce(run, "combine")
    if ddp.world_size() > 1:
        raise UsageError("combine runs in one process; start it without torchrun")
    settings = settings_of(run)
    check_grouping(run.config.coefficients)
    run.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.cache, ignore_cleanup_errors=True) as folder:
        settings = replace(settings, folder=Path(folder))
        (_negate if run.config.negate else _sum)(run, settings)


def _sum(run: Run, settings: Settings) -> None:
    path = run.results / f"{run.mode.prefix}combined_{slug(run)}.json"
    check_targets(run, path, checkpoint_path(run), report_path(run))
    results, model = combination(run, settings)
    results["checkpoint"] = str(save(run, model, results))
    write_results(path, results, run)
    print(f"{combination_table(run, results)}\n{account(results)}")
    print(f"wrote {path}, {checkpoint_path(run)} and {write_report(run)}")


def _negate(run: Run, settings: Settings) -> None:
    path = run.results / f"{run.mode.prefix}negated_{slug(run)}.json"
    check_targets(run, path)
    results = negations(run, settings)
    write_merged(path, results, run)
    print(f"{negation_table(run, results)}\nwrote {path}")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    _, args = parse_command("combine", argv, __doc__)
    setup_logging()
    work(Run.of(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
