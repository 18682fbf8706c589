"""Which modes a run has results or checkpoints of, found in its folders.

The files of a composed mode, such as `linear+taujp`, name it in their provenance: a file's prefix
does not determine it where the trained parameters are a regular expression.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tangent_arithmetic.run.modes import (
    ALL,
    BASELINES,
    MODES,
    SUPERVISED,
    Mode,
    edited,
    in_order,
    variant,
)
from tangent_arithmetic.run.results import optional_results, warn_once, weights_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

logger = logging.getLogger(__name__)

SINGLE, ADDITION, NEGATION = "single", "addition", "negation"


def kind_of(path: Path) -> tuple[Mode, str] | None:
    """The mode and the method of a file of results; None for other files.

    Args:
        path: the file; its content is read only where its name is not that of a mode in the table.

    Returns:
        The mode, and "single", "negation", "addition" or "addition A+B", a sum of some tasks.
    """
    for mode in MODES.values():
        if method := _method(mode, path.stem):
            return mode, method
    if not any(word in path.stem for word in ("ft_accuracies", "additions", "negations")):
        return None
    recorded = recorded_mode(optional_results(path).get("provenance", {}))
    method = "" if recorded is None else _method(recorded, path.stem)
    return None if recorded is None or not method else (recorded, method)


def _method(mode: Mode, stem: str) -> str:
    """What a mode's file of this name holds; nothing if it is not one of this mode."""
    if stem == mode.accuracies:
        return SINGLE
    if not mode.edits or not stem.startswith(mode.prefix):
        return ""
    operation, _, tasks = stem.removeprefix(mode.prefix).partition("-")
    if operation == "negations" and not tasks:
        return NEGATION
    return f"{ADDITION} {tasks}".strip() if operation == "additions" else ""


def recorded_mode(origin: Mapping[str, Any]) -> Mode | None:
    """The mode that a provenance names, or whose flags it holds; None if neither."""
    config = origin.get("config", {})
    name = origin.get("mode") or config.get("finetuning_mode")
    objective, trainable = config.get("objective"), config.get("trainable")
    try:
        mode = MODES[str(name)]
        if not mode.edits or mode.trained_by is not None or "mode" in origin:
            return mode
        return variant(mode, str(objective or SUPERVISED), str(trainable or ALL))
    except UsageError:  # a mode of another version, or of a user
        return None


def with_results(folder: Path) -> list[str]:
    """The modes with a file of results in a run's folder, in order; it may be damaged."""
    kinds = map(kind_of, sorted(folder.glob("*.json")))
    return in_order(kind[0].name for kind in kinds if kind is not None)


def files_of(folder: Path, mode: str, method: str) -> list[tuple[Path, str]]:
    """A mode's files of results, sorted by name, each with the tasks of a partial sum.

    Args:
        folder: the run's folder of results.
        mode: the mode.
        method: "single", "addition" or "negation".
    """
    found = []
    for path in sorted(folder.glob(f"{MODES[mode].prefix}*.json")):
        name, _, tasks = _method(MODES[mode], path.stem).partition(" ")
        if name == method:
            found.append((path, tasks))
    return found


def superseded(folder: Path, origin: Mapping[str, Any], mode: str) -> bool:
    """Whether a mode's single tasks are of other weights than results beside them.

    Weights that one of both does not record are not compared.

    Args:
        folder: the run's folder of results.
        origin: the provenance of the results.
        mode: the mode.
    """
    singles = optional_results(folder / f"{MODES[mode].accuracies}.json")
    now, then = weights_of(singles.get("provenance", {})), weights_of(origin)
    return any(now.get(name, value) != value for name, value in then.items())


def current_results(path: Path, mode: str) -> dict[str, Any]:
    """A mode's results in a file; empty, with a warning, if they are `superseded`."""
    found = optional_results(path)
    if superseded(path.parent, found.get("provenance", {}), mode):
        warn_once(f"{path} is left out: of earlier checkpoints than the single tasks of {mode}")
        return {}
    return found


def with_checkpoints(run: Run) -> tuple[list[str], dict[str, str]]:
    """The modes in which every task of a run is fine-tuned, without baselines of negation.

    Returns:
        Their names, in order; and those left out, each with a task whose checkpoint is missing.
    """
    from tangent_arithmetic.encoders.loading import resolve

    found, missing = [], {}
    composed = (m for m in _trained_composed(run) if MODES[m].objective not in BASELINES)
    for mode in in_order([*edited(), *composed]):
        for task in run.tasks:
            try:
                resolve(run.finetuned_path(task, mode))
            except MissingFileError:
                missing[mode] = task
                break
        else:
            found.append(mode)
    return found, missing


def _trained_composed(run: Run) -> list[str]:
    """The composed modes of which one of a run's tasks has a checkpoint."""
    from tangent_arithmetic.storage.checkpoints import read_header

    names = []
    for task in run.tasks:
        folder = run.finetuned_path(task, "standard").parent
        for path in sorted(folder.glob("*_finetuned.safetensors")):
            try:
                header = read_header(path)
                name = str((header or {}).get("info", {}).get("mode"))
                if "+" in name and path == run.finetuned_path(task, name):
                    names.append(name)
            except UsageError as error:
                logger.warning("%s", error)
    return names


def told(missing: Mapping[str, str]) -> str:
    """The modes without checkpoints, for the log."""
    parts = (f"{mode} (no checkpoint of {task})" for mode, task in missing.items())
    return ", ".join(parts)


def chosen(run: Run) -> Sequence[str]:
    """The modes to analyse: `--modes`, `--finetuning-mode`, or those with checkpoints.

    The last are said in the log. Without any they are all modes of the table, whose errors name
    what makes them.

    Raises:
        UsageError: if `--modes` names an unknown one, or one without task vectors.
    """
    if named := run.config.modes:
        if without := [name for name in named if not MODES[name].edits]:
            raise UsageError(f"--modes={without[0]} has no task vectors; leave it out")
        return in_order(MODES[name].name for name in named)
    if run.config.finetuning_mode is not None:
        return [run.mode.name]
    found, missing = with_checkpoints(run)
    if found and missing:
        logger.info("modes: %s; left out: %s", ", ".join(found), told(missing))
    return found or edited()
