"""Baselines of negation: random vectors, fine-tuning on the other tasks, gradient ascent.

Each is added with a coefficient that is chosen as that of the negated task vector, with the same
settings. A random vector
has the norm of the task vector in each weight. "others" is the sum of the other tasks' vectors, not
negated. "ascent" is the vector of fine-tuning with the loss's sign turned, and "ascent, whole" the
fine-tuned model itself; they need checkpoints of the mode with the objective ascent.

Source: arXiv:2212.04089, section 3.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import means, named, panels
from tangent_arithmetic.encoders.base import Encoder, ModuleEncoder
from tangent_arithmetic.run.models import (
    base_encoder,
    command,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.modes import BASELINES, MODES, distinct, variant
from tangent_arithmetic.run.negation import negate_task, zeroshot_accuracies
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.statedict import State, add, scale

logger = logging.getLogger(__name__)

# keys of a negation, and their columns
COLUMNS = {
    "coefficient": "coefficient",
    "test": "target",
    "test_control": "control",
    "zeroshot": "zeroshot",
    "zeroshot_control": "zeroshot_control",
}
TASK, RANDOM, OTHERS, ASCENT, WHOLE = "task", "random", "others", "ascent", "ascent, whole"


def random_like(tau: State, seed: int, task: str) -> dict[str, torch.Tensor]:
    """Gaussian noise with the norm of tau in each weight, determined by (seed, task, name)."""
    noises = {}
    for name, value in tau.items():
        entropy = [seed, 17, *task.encode(), *name.encode()]
        draw = np.random.default_rng(entropy).standard_normal(tuple(value.shape), np.float32)
        noise = torch.from_numpy(np.asarray(draw))
        norm = noise.norm()
        noises[name] = noise * (value.norm() / norm) if norm > 0 else noise
    return noises


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Negation of task vectors and its baselines, on the test splits.

    Returns:
        Columns mode, vector ("task", "random", "others", "ascent", "ascent, whole"), task,
        coefficient, target, control, zeroshot, zeroshot_control.
    """
    start = zeroshot_encoder(run)
    singles = zeroshot_accuracies(run, start[1])
    rows = []
    for mode in modes:
        base = base_encoder(start[0], mode)
        taus = {task: task_vector(run, task, mode, *start).vector for task in run.tasks}
        for task in run.tasks:
            found = {TASK: negate_task(run, task, taus[task], base, singles)}
            for kind, vector in _added(run, mode, task, taus, start):
                found[kind] = negate_task(run, task, scale(vector, -1.0), base, singles)
                if kind == ASCENT:
                    found[WHOLE] = _whole(run, task, vector, base, singles)
            for kind, result in found.items():
                rows.append((mode, kind, task, *(result[key] for key in COLUMNS)))
    return pd.DataFrame(rows, columns=["mode", "vector", "task", *COLUMNS.values()])


def _added(
    run: Run, mode: str, task: str, taus: Mapping[str, State], start: tuple[ModuleEncoder, str]
) -> Iterator[tuple[str, State]]:
    """The vectors to add in place of -tau, by kind."""
    yield RANDOM, scale(random_like(taus[task], run.seed, task), -1.0)
    others = [tau for name, tau in taus.items() if name != task]
    if others:
        yield OTHERS, functools.reduce(add, others)
    if (ascent := ascent_of(mode)) is not None:
        try:
            yield ASCENT, task_vector(run, task, ascent, *start).vector
        except MissingFileError:
            made_by = command("finetune", run, ascent, task=task)
            logger.info("no gradient ascent on %s; make it with: %s", task, made_by)


def ascent_of(mode: str) -> str | None:
    """The mode of gradient ascent beside a mode; None for one that is trained in another way."""
    try:
        found = variant(MODES[mode], ASCENT)
    except UsageError:
        return None
    return found.name if MODES[mode].objective not in (*BASELINES, found.objective) else None


def _whole(
    run: Run, task: str, vector: State, base: Encoder, singles: Mapping[str, float]
) -> dict[str, float]:
    """The model after fine-tuning, at coefficient 1."""
    names = {"test": task, "test_control": run.control}
    found = {key: split_of(run, base, name).sweep(base, vector, [1.0])[0]
             for key, name in names.items()}  # fmt: skip
    zero = {"zeroshot": singles[task], "zeroshot_control": singles[run.control]}
    return {"coefficient": 1.0, **found, **zero}


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Test accuracy on the negated task and on the control set, by kind of vector.

    Bars are the standard deviation of the tasks' mean over seeds, where the table has several.
    """
    figure, axes = panels(1, 2, width=4.2, height=3.4)
    modes = distinct(table["mode"])
    kinds = [kind for kind in palette.HATCHES if kind in set(table["vector"])]
    step = 0.8 / len(kinds)
    sides = (
        ("target", "zeroshot", "negated task"),
        ("control", "zeroshot_control", f"{run.control} (control)"),
    )
    for axis, (column, before, title) in zip(axes[0], sides, strict=True):
        for k, kind in enumerate(kinds):
            heights, errors = means(table[table["vector"] == kind], "mode", column)
            style = {"hatch": palette.HATCHES[kind], "edgecolor": "white"}
            for i, mode in enumerate(modes):
                if mode.name in heights.index:
                    place = i + step * (k - (len(kinds) - 1) / 2)
                    error = None if errors is None else errors[mode.name]
                    look = {"color": mode.colour, "ecolor": palette.INK, **style}
                    axis.bar(place, heights[mode.name], 0.95 * step, yerr=error, **look)
            label = f"{kind} vector" if kind in (TASK, RANDOM) else kind
            axis.bar(0, 0, color=palette.REFERENCE, label=label, **style)
        start = 100 * table[before].mean()
        axis.axhline(start, color=palette.ZEROSHOT, ls=":", label="zero-shot")
        named(axis, [mode.label for mode in modes])
        axis.set(title=title, ylabel="test accuracy, mean of the tasks, %", ylim=(0, 100))
    axes[0][0].legend(loc="upper right")
    return figure
