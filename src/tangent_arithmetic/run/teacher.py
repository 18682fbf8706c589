"""The linear checkpoint that teaches a standard model of the same task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.encoders.loading import read_facts, resolve
from tangent_arithmetic.run.config import Config
from tangent_arithmetic.run.models import check_split, check_start, load_encoder
from tangent_arithmetic.run.modes import Mode, get_mode
from tangent_arithmetic.run.pretrained import zeroshot_hash
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.suggest import command
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

TEACHERS = ("linear+taujp", "linear")  # the first that is there
OF_DELTA = ("coef_min", "coef_max", "coefs_per_step")
OWN = ("teacher", "penalty", "penalty_norm", *OF_DELTA)  # settings of the student alone


def teacher_of(run: Run, task: str) -> tuple[str, Path]:
    """The mode and the checkpoint of a task's teacher: `--teacher`, or the best linear one.

    Raises:
        MissingFileError: if it is not there, naming the command that makes it.
        UsageError: if it is not linear, or started from other weights than the run.
    """
    named = run.config.teacher
    modes = [get_mode(name) for name in ([named] if named else TEACHERS)]
    if not all(mode.linear and mode.trained_by is None for mode in modes):
        raise UsageError(f"--teacher: expected a mode that trains a linear model, got {named}")
    start, defaults = zeroshot_hash(run), Config()
    plain = run.with_(**{name: getattr(defaults, name) for name in OWN})
    mode, path = _first(plain, task, modes)
    check_start(path, plain, mode.name, start)
    check_split(path, run, task)
    return mode.name, path


def _first(run: Run, task: str, modes: list[Mode]) -> tuple[Mode, Path]:
    """The first of these modes with a checkpoint of a task, and that."""
    *preferred, last = modes
    for mode in preferred:
        try:
            return mode, resolve(run.finetuned_path(task, mode.name))
        except MissingFileError:
            continue
    made_by = command("finetune", run, last.name, task=task)
    return last, resolve(run.finetuned_path(task, last.name), made_by)


def teacher_facts(run: Run, task: str) -> dict[str, Any]:
    """What a student's checkpoint records of its teacher and of the coefficients."""
    name, path = teacher_of(run, task)
    own = {setting: getattr(run.config, setting) for setting in OF_DELTA}
    return {"teacher": name, "teacher_hash": read_facts(path)["hash"], **own}


def load_teacher(run: Run, task: str) -> LinearizedEncoder:
    """The teacher of a task.

    Raises:
        UsageError: if its checkpoint holds another kind of model.
    """
    _, path = teacher_of(run, task)
    encoder = load_encoder(path, linear=True)
    if not isinstance(encoder, LinearizedEncoder):
        raise UsageError(f"{path} holds a {type(encoder).__name__}, expected a linear encoder")
    return encoder
