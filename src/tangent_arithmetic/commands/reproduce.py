"""Runs the whole benchmark: fine-tune, evaluate, add, solve, negate, report; prints the tables.

What is done is skipped: a stage counts as done when its results are those it wrote and the
checkpoints behind them are the same. --modes names the modes, such as
--modes=linear,linear+taujp. --paper=arithmetic or --paper=tangent makes every table and figure of a
paper that applies, named as there, in a folder with LaTeX and a table of its claims. Any other flag
is passed to the scripts in src/.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import make_dataclass, replace
from typing import Annotated, Any

from tangent_arithmetic.commands import paper as papers
from tangent_arithmetic.commands.stages import Stage, stages
from tangent_arithmetic.report.papers.items import PAPERS, Paper
from tangent_arithmetic.run.args import HELP, Config, flags, paragraphs, parse_arguments
from tangent_arithmetic.run.checks import check
from tangent_arithmetic.run.modes import ALL, MODES, SUPERVISED, edited, in_order, trained
from tangent_arithmetic.run.parser import Parser
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.usage import REPRODUCE, examples_of
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.digests import file_hash
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, entry_point
from tangent_arithmetic.runtime.eta import Estimate, shown_time
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


class Ledger:
    """Which stages are done, kept with the checkpoints.

    Results that came with a clone are in no ledger and do not count.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.folder / "stages.json"

    def _entry(self, stage: Stage, modes: Sequence[str]) -> dict[str, Any]:
        """What identifies a finished stage whose inputs are the checkpoints of these modes."""
        from tangent_arithmetic.encoders.loading import read_facts

        assert stage.output is not None
        files = [self.run.zeroshot_path]
        for task in (*self.run.tasks, *stage.sets):
            files += [self.run.finetuned_path(task, mode) for mode in modes]
        inputs = [read_facts(f)["hash"] for f in files if f.is_file()]
        exists = stage.output.is_file()
        digest = file_hash(stage.output) if exists else None
        return {"argv": stage.argv, "inputs": inputs, "output": digest}

    def _entries(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """What identifies a finished stage, by name; of an analysis its rows of each mode.

        Other calls may add rows of other modes to its table.

        Raises:
            UsageError: if the table is damaged.
        """
        from tangent_arithmetic.analysis.tables import rows_hash

        assert stage.output is not None
        if stage.output.suffix != ".csv":
            return {stage.name: self._entry(stage, stage.inputs)}
        one = replace(stage, argv=[w for w in stage.argv if not w.startswith("--modes=")])
        entries = {mode: self._entry(one, [MODES[mode].training.name]) for mode in stage.modes}
        return {
            f"{stage.name}, {mode}": {**entry, "output": rows_hash(stage.output, mode)}
            for mode, entry in entries.items()
        }

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
        found, accepted = without_home(self._read()), [stage.inputs]
        if set(stage.inputs) <= set(trained()) and not stage.sets:
            accepted.append(trained())  # earlier ledgers hold the tasks' checkpoints of these
        earlier = found.get(stage.name)
        if any(earlier == without_home(self._entry(stage, modes)) for modes in accepted):
            return True
        try:
            entries = without_home(self._entries(stage))
        except UsageError as error:
            logger.warning("%s does not count as done: %s", stage.name, error)
            return False
        return all(found.get(name) == entry for name, entry in entries.items())

    def note(self, stage: Stage) -> None:
        """Notes that a stage is done."""
        if stage.output is not None:
            write_json(self.path, {**self._read(), **self._entries(stage)})


def run_stages(run: Run, todo: Sequence[Stage], label: str, estimate: Estimate) -> None:
    """Runs what is not done, and says how far it is."""
    ledger, start = Ledger(run), time.monotonic()
    for i, stage in enumerate(todo):
        finished = ledger.is_done(stage)
        for part, words in stage.parts.items():
            left = estimate.left()
            told = f"{(time.monotonic() - start) / 60:.1f} min so far"
            told += "" if left is None else f", about {shown_time(left)} left"
            name = f"{stage.name}: {part}" if part else stage.name
            print(f"\n[{label}{i + 1}/{len(todo)}] {name} ({told})", flush=True)
            if finished:
                print(f"done before, skipped ({stage.output})")
                estimate.skip()
                continue
            begin = time.monotonic()
            code = stage.main([*stage.argv, *words])
            if code > 128:  # a signal ended it, and it has said so
                raise SystemExit(code)
            if code:
                raise UsageError(f"{stage.name} ended with code {code}, see above")
            estimate.done(time.monotonic() - begin)
        if not finished:
            ledger.note(stage)
        sys.stdout.flush()


def _help() -> None:
    """Prints the help and ends the program."""
    import tyro

    about = tyro.conf.arg(help="number of seeds, from 0", metavar="N")
    quick = tyro.conf.arg(help="two tasks, one epoch, in checkpoints/quick")
    made = tyro.conf.arg(
        help="make the tables, figures and claims of a paper: arithmetic or tangent", metavar="NAME"
    )
    which = tyro.conf.arg(
        help="modes to fine-tune and evaluate, such as standard,linear,linear+taujp",
        metavar="MODE,...",
    )
    own = make_dataclass(
        "benchmark",
        [
            ("seeds", Annotated[int, about], 1),
            ("modes", Annotated[str, which], ",".join(edited())),
            ("quick", Annotated[bool, quick], False),
            ("paper", Annotated[str | None, made], None),
        ],
    )
    shown = flags(REPRODUCE.fields, texts=REPRODUCE.texts, first={"benchmark": own})
    tyro.cli(
        shown,
        prog="tangent-arithmetic reproduce",
        description=paragraphs(f"{(__doc__ or '').strip()}\n\n{examples_of(REPRODUCE.examples)}"),
        args=["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )


def _options(argv: Sequence[str] | None) -> tuple[int, list[str], list[str], Config, Paper | None]:
    """The number of seeds, the modes, the flags for the scripts, the settings, and the paper.

    Raises:
        UsageError: for flags that do not go together.
    """
    words = sys.argv[1:] if argv is None else argv
    if HELP & set(words):
        _help()
    parser = Parser(add_help=False)
    parser.add_argument("--seeds", type=number(int, 1, 10_000), default=1)
    parser.add_argument("--modes")
    parser.add_argument("--paper", choices=sorted(PAPERS))
    parser.add_argument("--quick", action="store_true")
    own, rest = parser.parse_known_args(words)
    if own.quick and own.seeds > 1:
        raise UsageError("--quick is one seed; leave out --quick or --seeds")
    if own.quick:
        rest = [*QUICK, *rest]
    if any(f.startswith(("--seed=", "--finetuning-mode")) or f == "--seed" for f in rest):
        raise UsageError("expected no --seed and no --finetuning-mode here; use --seeds=N, --modes")
    config = parse_arguments(rest)
    if own.seeds > 1 and config.save is not None:
        raise UsageError("--save names one run's folder; leave it out with several seeds")
    if config.objective != SUPERVISED or config.trainable != ALL:
        raise UsageError(
            "expected no --objective and no --trainable here; name the modes that have them, "
            "such as --modes=linear,linear+taujp"
        )
    paper = PAPERS.get(own.paper)
    named = edited() if paper is None else paper.modes
    modes = _modes(",".join(named) if own.modes is None else own.modes)
    return own.seeds, modes, rest, config, paper


def _modes(text: str) -> list[str]:
    """The modes that `--modes` names, in order.

    Raises:
        UsageError: if one is unknown, or has no task vectors.
    """
    names = [MODES[name.strip()].name for name in text.split(",") if name.strip()]
    if without := [name for name in names if not MODES[name].edits]:
        raise UsageError(f"--modes={without[0]} has no task vectors; it is evaluated anyway")
    if not names:
        raise UsageError(f"--modes names nothing; choose from {', '.join(edited())}")
    return in_order(names)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    seeds, modes, flags, config, paper = _options(argv)
    run = Run.of(config)
    check(run)
    from tangent_arithmetic.analysis.figures import overview
    from tangent_arithmetic.report.page import report_path
    from tangent_arithmetic.run.results import check_targets
    from tangent_arithmetic.run.summary import overview_path, summary_path, with_seed, write_summary
    from tangent_arithmetic.runtime.logs import setup_logging

    setup_logging()
    logging.captureWarnings(True)
    start = time.monotonic()
    runs = [with_seed(run, seed) for seed in range(seeds)]
    shown, figure = summary_path(run, "md"), overview_path(run)
    ledgers = [Ledger(run).path for run in runs]
    for path in (summary_path(run), shown, figure, *ledgers):
        check_writable(path)
    seeded = [[*flags, f"--seed={seed}"] if seed else flags for seed in range(seeds)]
    work = [stages(r, words, modes) for r, words in zip(runs, seeded, strict=True)]
    if paper is not None:
        for run, words, todo in zip(runs, seeded, work, strict=True):
            todo[-1:-1] = papers.further(paper, run, words, modes)
        needed = papers.data_sets(paper, run, modes)
        print(papers.plan(paper, runs, work, needed), flush=True)
        for name in needed:
            run.data.dataset(name)  # stops for one that is not there, before the work
    for run, todo in zip(runs, work, strict=True):
        check_targets(run, *(stage.output for stage in todo if stage.output))
    estimate = Estimate([step for todo in work for stage in todo for step in stage.steps])
    for seed, (run, todo) in enumerate(zip(runs, work, strict=True)):
        run_stages(run, todo, f"seed {seed}: " if seeds > 1 else "", estimate)
    summary, tables = write_summary(runs)
    overview(runs[0], summary, figure)
    print(f"\n{tables}\n")
    if paper is not None:
        folder = papers.write(paper, runs, modes)
        print(f"tables, figures and claims of the paper: {folder}/README.md")
    print(f"results: {shown}, {shown.with_suffix('.json')}, {figure}")
    pages = ", ".join(str(report_path(run)) for run in runs)
    print(f"pages, with the tangent explorer; open them in a browser: {pages}")
    print(f"checkpoints: {', '.join(str(run.folder) for run in runs)}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
