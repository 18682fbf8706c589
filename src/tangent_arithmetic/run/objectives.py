"""The objective of a run, and the parameters that it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tangent_arithmetic.data.registry import ImageDataset
from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.base import Transform
from tangent_arithmetic.run.factors import factors_facts, factors_of
from tangent_arithmetic.run.modes import ALL, SUPERVISED
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.teacher import OF_DELTA, load_teacher, teacher_facts
from tangent_arithmetic.training.objectives import OBJECTIVES, Objective, Setting

OF_PENALTY = ("penalty", "penalty_norm")
OF_OTHERS = ("others_batch_size", "others_per_step")
WITH_OTHERS = ("taujp",)  # objectives that see images of other data sets
# what an objective may read, by name: of (run, task)
FILES = {"teacher": load_teacher, "factors": factors_of}


def method_of(run: Run, task: str) -> dict[str, Any]:
    """What a checkpoint records of objective and trained parameters; nothing for the papers'.

    Args:
        run: the run.
        task: the task.
    """
    mode, config = run.mode, run.config
    facts: dict[str, Any] = {}
    if mode.trainable != ALL:
        facts["trainable"] = mode.trainable
    if mode.objective != SUPERVISED:
        facts["objective"] = mode.objective
        facts |= {name: getattr(config, name) for name in OF_PENALTY}
    if mode.objective in WITH_OTHERS:
        facts["others"] = run.others(task)
        facts |= {name: getattr(config, name) for name in OF_OTHERS}
    if mode.objective == "tak":
        facts |= factors_facts(run, task)
    if mode.objective == "delta":
        facts |= teacher_facts(run, task)
    return facts


def objective_of(run: Run, task: str, data: ImageDataset, model: nn.Module) -> Objective:
    """The objective with which a task is fine-tuned.

    Args:
        run: the run.
        task: the task.
        data: its data set.
        model: the classifier, on its device.

    Raises:
        UsageError: if the objective needs images of other data sets, and there are none.
    """
    config = run.config
    setting = Setting(
        recipe=run.recipe(task),
        multilabel=data.multilabel,
        model=model,
        penalty=config.penalty,
        options={"seed": run.seed, **{n: getattr(config, n) for n in (*OF_PENALTY, *OF_DELTA)}},
        others=_others(run, task, getattr(model, "train_preprocess", None)),
        files=lambda name: FILES[name](run, task),
    )
    return OBJECTIVES[run.mode.objective](setting)


def _others(run: Run, task: str, transform: Transform | None) -> Callable[[], Unlabelled]:
    def make() -> Unlabelled:
        return Unlabelled(
            {name: run.data.dataset(f"{name}Val").train for name in run.others(task)},
            transform,
            run.config.others_batch_size,
            together=run.config.others_per_step == "all",
            seed=run.seed,
            num_workers=run.num_workers,
        )

    return make
