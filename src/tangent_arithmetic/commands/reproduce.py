"""Runs the whole benchmark: fine-tune, evaluate, add, negate, report; then prints the tables.

    python scripts/reproduce.py --suite=embedded --seeds=3

What is done is skipped: a stage counts as done when its results are those it wrote and the
checkpoints behind them are the same. Any other flag is passed to the scripts in src/.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_arithmetic.analysis.figures import overview
from tangent_arithmetic.commands import add, analyze, evaluate, finetune, negate
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.report.page import report_path
from tangent_arithmetic.run.args import Parser, parse_arguments
from tangent_arithmetic.run.modes import MODES, edited, trained
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, check_targets
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import with_seed, write_summary
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.private import without_home
from tangent_arithmetic.runtime.ranges import number
from tangent_arithmetic.storage.reading import read_json

QUICK = (
    "--tasks=MNIST,Signs",
    "--epochs=1",
    "--n-eval-points=5",
    "--save=checkpoints/quick",
    "--results=checkpoints/quick/results",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One call of an entry point.

    Attributes:
        name: for the log.
        main: the entry point.
        argv: its arguments.
        output: the results file that it writes; None for fine-tuning, which skips by itself.
        share: rough share of the whole time, for the ETA.
    """

    name: str
    main: Callable[[Sequence[str]], int]
    argv: list[str]
    output: Path | None
    share: float


def stages(run: Run, flags: list[str]) -> list[Stage]:
    """All stages of a run, in order."""

    def argv(mode: str) -> list[str]:
        return [f"--finetuning-mode={mode}", *flags]

    found = [
        Stage("zero-shot evaluation", evaluate.main, argv("none"), accuracies_path(run, "none"), 6)
    ]
    for mode in trained():
        share = 42.0 if MODES[mode].linear else 22.0
        found.append(Stage(f"{mode} fine-tuning", finetune.main, argv(mode), None, share))
    for mode in edited():
        path = accuracies_path(run, mode)
        found.append(Stage(f"{mode} single-task evaluation", evaluate.main, argv(mode), path, 2))
    for mode in edited():
        path = arithmetic_path(run, mode, "additions")
        found.append(Stage(f"{mode} task addition", add.main, argv(mode), path, 3))
    for mode in edited():
        path = arithmetic_path(run, mode, "negations")
        found.append(Stage(f"{mode} task negation", negate.main, argv(mode), path, 5))
    page = report_path(run)
    found.append(Stage("report page", analyze.main, [analyze.REPORT, *flags], page, 4))
    return found


class Ledger:
    """Which stages are done, kept with the checkpoints.

    Results that came with a clone are in no ledger and do not count.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.folder / "stages.json"

    def _entry(self, stage: Stage) -> dict[str, Any]:
        assert stage.output is not None
        files = [self.run.zeroshot_path]
        for task in self.run.tasks:
            files += [self.run.finetuned_path(task, m) for m in trained()]
        inputs = [read_facts(f)["hash"] for f in files if f.is_file()]
        if "zero-shot" in stage.name:
            inputs = inputs[:1]
        exists = stage.output.is_file()
        digest = hashlib.sha256(stage.output.read_bytes()).hexdigest() if exists else None
        return {"argv": stage.argv, "inputs": inputs, "output": digest}

    def _read(self) -> dict[str, Any]:
        try:
            return read_json(self.path)
        except MissingFileError:
            return {}
        except UsageError as error:
            logger.warning("no stage counts as done: %s", error)
            return {}

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage's results are there and still those of today's checkpoints."""
        if stage.output is None or not stage.output.is_file():
            return False
        found, wanted = self._read().get(stage.name), self._entry(stage)
        return bool(without_home(found) == without_home(wanted))

    def note(self, stage: Stage) -> None:
        """Notes that a stage is done."""
        if stage.output is not None:
            entries = {**self._read(), stage.name: self._entry(stage)}
            write_json(self.path, entries)


def run_stages(run: Run, flags: list[str], label: str) -> None:
    """Runs what is not done, and says how far it is."""
    todo, ledger, start, done = stages(run, flags), Ledger(run), time.monotonic(), 0.0
    total = sum(stage.share for stage in todo)
    skipped = 0.0
    for i, stage in enumerate(todo):
        spent = time.monotonic() - start
        worked = done - skipped
        eta = spent / worked * (total - done) if worked > 5 else None
        left = f", about {eta / 60:.0f} min left" if eta else ""
        print(f"\n[{label}{i + 1}/{len(todo)}] {stage.name} ({spent / 60:.1f} min so far{left})")
        if ledger.is_done(stage):
            print(f"done before, skipped ({stage.output})")
            skipped += stage.share
        else:
            code = stage.main(stage.argv)
            if code > 128:  # a signal ended it, and it has said so
                raise SystemExit(code)
            if code:
                raise UsageError(f"{stage.name} ended with code {code}, see above")
            ledger.note(stage)
        sys.stdout.flush()
        done += stage.share


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__)
    seeds = number(int, 1, 10_000)
    parser.add_argument("--seeds", type=seeds, default=1, help="number of seeds, from 0")
    parser.add_argument(
        "--quick", action="store_true", help="two tasks, one epoch, in checkpoints/quick"
    )
    own, flags = parser.parse_known_args(argv)
    if own.quick:
        flags = [*QUICK, *flags]
    if any(f.startswith(("--seed=", "--finetuning-mode")) or f == "--seed" for f in flags):
        raise UsageError("expected no --seed and no --finetuning-mode here; use --seeds=N")
    run = Run.of(parse_arguments(flags))
    if own.seeds > 1 and run.config.save is not None:
        raise UsageError("--save names one run's folder; leave it out with several seeds")
    setup_logging()
    logging.captureWarnings(True)
    start = time.monotonic()
    runs = [with_seed(run, seed) for seed in range(own.seeds)]
    suite = run.results.parent
    figure = suite / "figures" / "overview.png"
    ledgers = [Ledger(run).path for run in runs]
    for path in (suite / "summary.json", suite / "summary.md", figure, *ledgers):
        check_writable(path)
    for run in runs:
        check_targets(run, *(stage.output for stage in stages(run, flags) if stage.output))
    for seed, run in enumerate(runs):
        label = f"seed {seed}: " if own.seeds > 1 else ""
        run_stages(run, [*flags, f"--seed={seed}"] if seed else flags, label)
    summary, tables = write_summary(runs)
    overview(runs[0], summary, figure)
    print(f"\n{tables}\n")
    print(f"results: {suite}/ (summary.md, summary.json, figures/)")
    print(f"pages: {', '.join(str(report_path(run)) for run in runs)}")
    print(f"checkpoints: {', '.join(str(run.folder) for run in runs)}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
