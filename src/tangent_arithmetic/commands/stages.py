"""The stages of a whole benchmark: calls of the other commands, in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tangent_arithmetic.run.costs import Costs
from tangent_arithmetic.run.modes import MODES, edited, in_order
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.eta import Step

logger = logging.getLogger(__name__)

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Stage:
    """One call of an entry point, or several.

    Attributes:
        name: for the log.
        main: the entry point.
        argv: its arguments.
        output: the results file that it writes; None for fine-tuning, which skips by itself.
        cost: what is expected of it, for the time left.
        parts: what is called one after the other, each with further arguments; by name.
        modes: the modes that it is of.
        sets: data sets beside the run's tasks whose checkpoints it reads.
    """

    name: str
    main: Main
    argv: list[str]
    output: Path | None
    cost: Step
    parts: dict[str, list[str]] = field(default_factory=lambda: {"": []})
    modes: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """The modes whose checkpoints it reads."""
        return in_order(MODES[m].training.name for m in self.modes if MODES[m].edits)

    @property
    def steps(self) -> list[Step]:
        """Its parts, for an estimate of the time left."""
        return [Step(self.cost.kind, self.cost.cost / len(self.parts))] * len(self.parts)


def stages(run: Run, flags: list[str], modes: Sequence[str] | None = None) -> list[Stage]:
    """All stages of a run, in order.

    Args:
        run: the run.
        flags: its flags, for each entry point.
        modes: the modes with task vectors; None for those of the table.
    """
    from tangent_arithmetic.commands import add, analyze, combine, evaluate, finetune, negate
    from tangent_arithmetic.report.page import report_path
    from tangent_arithmetic.run.results import SOLVED, accuracies_path, arithmetic_path, solved_path

    def stage(name: str, main: Main, mode: str, output: Path | None, cost: Step,
              *more: str) -> Stage:  # fmt: skip
        parts = {"": list[str]()} if output else each_task(run)
        argv = [f"--finetuning-mode={mode}", *flags, *more]
        return Stage(name, main, argv, output, cost, parts, (mode,))

    costs = Costs.of(run)
    modes = edited() if modes is None else modes
    zeroshot = accuracies_path(run, "none")
    found = [stage("zero-shot evaluation", evaluate.main, "none", zeroshot, costs.zeroshot)]
    for mode in _in_training_order(modes):
        found.append(stage(f"{mode} fine-tuning", finetune.main, mode, None, costs.training(mode)))
    explored = next((mode for mode in in_order(modes) if MODES[mode].linear), None)
    for mode in modes:
        name, path = f"{mode} single-task evaluation", accuracies_path(run, mode)
        ahead = [f"--ahead={'page' if mode == explored else 'sums'}"] if MODES[mode].linear else []
        single = stage(name, evaluate.main, mode, path, costs.single(mode))
        found.append(replace(single, parts={"": ahead}))  # no part of what the ledger compares
    for mode in modes:
        name, path = f"{mode} task addition", arithmetic_path(run, mode, "additions")
        found.append(stage(name, add.main, mode, path, costs.addition(mode)))
    for mode in modes:
        name, path = f"{mode} solved addition", solved_path(run, mode)
        found.append(stage(name, combine.main, mode, path, costs.solved(mode), *SOLVED))
    if run.control_set is None:
        logger.info("no negation: suite %s has no control set", run.suite.name)
    for mode in modes if run.control_set else ():
        name, path = f"{mode} task negation", arithmetic_path(run, mode, "negations")
        found.append(stage(name, negate.main, mode, path, costs.negation(mode)))
    words, page = [analyze.REPORT, *flags], report_path(run)
    shown = (*edited(), *modes)
    found.append(Stage("report page", analyze.main, words, page, costs.report, modes=shown))
    return found


def _in_training_order(modes: Sequence[str]) -> list[str]:
    """The modes that fine-tune for these; one that learns from a linear model comes after it."""
    training = in_order(MODES[mode].training.name for mode in modes)
    return sorted(training, key=lambda mode: MODES[mode].objective == "delta")


def each_task(run: Run) -> dict[str, list[str]]:
    """Arguments to fine-tune one task after the other; all at once where processes are started."""
    if run.config.world_size > 1:
        return {"": []}
    named = run.config.train_dataset or run.config.tasks or run.tasks
    return {text.partition("=")[0]: [f"--train-dataset={text}"] for text in named}
