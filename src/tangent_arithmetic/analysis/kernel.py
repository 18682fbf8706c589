r"""Eigenfunctions of the linear model's kernel on images of all tasks, and their use by vectors.

Where eigenfunctions that a task vector uses are large on the images of its own task alone, its edit
leaves the other tasks as they are: the explanation of disentanglement.

A kernel that is estimated mixes eigenfunctions of close eigenvalues, across tasks too, and so moves
localisation towards an even spread, by far more than its standard error. Hence the exact kernel
wherever it takes at most `AFFORDED` backward passes.

Source: arXiv:2305.12827, section 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.edits import Edits, joined
from tangent_arithmetic.analysis.figures import means, named, panels
from tangent_arithmetic.analysis.interference import linear_of
from tangent_arithmetic.arithmetic.eigenfunctions import Eigenfunctions
from tangent_arithmetic.arithmetic.features import computed_once, linear_features
from tangent_arithmetic.arithmetic.kernel import Kernel, exact, passes, sketched
from tangent_arithmetic.data.texts import collate
from tangent_arithmetic.encoders.base import ModuleEncoder, is_linear
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.software import sources_hash
from tangent_arithmetic.storage.statedict import content_hash

AFFORDED = (
    2**16
)  # backward passes of an exact kernel by default; half of them took a core 11 minutes
DIRECTIONS = 128  # of the estimate beyond
CODE = ("arithmetic/kernel.py",)  # that a kept kernel depends on, beside what features do
OF_VECTORS = ("even", "shift", "error")  # columns with one value for each vector


def sampled(run: Run) -> Run:
    """The run on at most `--kernel-images` of each task."""
    return run.at_most(run.config.kernel_images)


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Eigenfunctions of the kernel on `--kernel-images` test images of each task.

    Returns:
        Columns mode, task (of the vector), function (from 1, the largest eigenvalue first),
        eigenvalue (share of the trace), own (share of the eigenfunction's square on the task's
        images), even (share of the images that are the task's: `own` if spread evenly), use (share
        of |J tau|^2 along it), error (relative standard error of the kernel), shift (how much more
        localisation there is with all random directions than with half of them); the last two are
        0 of an exact kernel.

    Raises:
        UsageError: if no mode is linear.
    """
    modes = linear_of(modes, "the kernel")
    few = sampled(run)
    edits = Edits(few, modes[0], run.tasks)
    images = [_images(edits, task) for task in run.tasks]
    assert isinstance(edits.encoder, ModuleEncoder)
    together = collate([(image, 0) for some in images for image in some])[0]
    measured = _kernel(run, edits.encoder, together)
    sizes = [len(some) for some in images]
    found, *halves = map(Eigenfunctions.of, (measured.values, *measured.halves))
    energy, parts = found.energy(sizes), []
    for mode in modes:
        for t, function in enumerate(_functions(Edits(few, mode, run.tasks), run.tasks)):
            part = {
                "mode": mode,
                "task": run.tasks[t],
                "function": range(1, len(found.eigenvalues) + 1),
                "eigenvalue": found.eigenvalues / found.eigenvalues.sum(),
                "own": energy[:, t],
                "even": sizes[t] / sum(sizes),
                "use": (use := found.use(function)),
                "error": measured.relative_error,
                "shift": 0.0,
            }
            if halves:
                half = [(one.energy(sizes)[:, t] * one.use(function)).sum() for one in halves]
                part["shift"] = float((energy[:, t] * use).sum() - sum(half) / len(half))
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def _kernel(run: Run, encoder: ModuleEncoder, images: Tensor) -> Kernel:
    encoder, images = encoder.to(run.device), images.to(run.device)
    directions = run.config.kernel_directions
    if directions is None:
        directions = 0 if passes(encoder, images) <= AFFORDED else DIRECTIONS
    if directions:
        return sketched(encoder, images, directions=directions, seed=run.seed)
    # the same for every seed and mode
    of = {"kernel of": content_hash({"images": images}), "code": sources_hash(CODE)}
    values = computed_once(
        encoder, of, lambda: exact(encoder, images).values, run.compute, run.feature_cache
    )
    return Kernel(values)


def _images(edits: Edits, task: str) -> list[Tensor]:
    """The images of a task, or its texts, whose batches differ in length; of all ranks."""
    shares = ddp.gather([images for images, _ in edits.split(task).batches])
    return [image for share in shares for batch in share for image in batch]


def _functions(edits: Edits, tasks: Sequence[str]) -> list[Tensor]:
    """J tau of each task vector on the images of all tasks and ranks."""
    assert is_linear(edits.base)
    vectors, directions = list(edits.vectors.values()), []
    for task in tasks:
        split = edits.split(task)
        features = linear_features(edits.base, vectors, split.batches, split.compute, split.cache)
        directions.append([joined([values]) for values in features.directions])
    return [torch.cat(column) for column in zip(*directions, strict=True)]


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Sums over leading eigenfunctions, which may be averaged over seeds.

    Single eigenfunctions may not: one of the same rank is another function in another seed.

    Returns:
        The table with, in place of own and use, the columns used (share of |J tau|^2 along this and
        all larger eigenfunctions) and local (the part of it on the task's images).
    """
    if "local" in table:
        return table
    keys = [key for key in ("seed", "mode", "task") if key in table]
    parts = table.assign(local=table["own"] * table["use"], used=table["use"])
    sums = parts.groupby(keys, sort=False)[["used", "local"]].cumsum()
    return table.drop(columns=["own", "use"]).assign(**sums)


def localisation(table: pd.DataFrame) -> pd.DataFrame:
    """The share on the own task's images of the eigenfunctions that a vector uses.

    Args:
        table: of `table` or `curves`.

    Returns:
        Columns mode, task, share: the mean of `own` weighted by `use`; 1 is perfectly local; and
        even, shift, error; and seed, if the table has it.
    """
    keys = [key for key in ("seed", "mode", "task") if key in table]
    last = curves(table).groupby(keys, sort=False).last().reset_index()
    return last.rename(columns={"local": "share"})[[*keys, "share", *OF_VECTORS]]


def draw(table: pd.DataFrame, run: Run) -> Any:
    """The spectrum, the use of leading eigenfunctions, and their localisation, by mode.

    Bands and bars are the standard deviation of the tasks' mean over seeds, where the table has
    several; points are the tasks.
    """
    table = curves(table)
    figure, axes = panels(1, 3, width=3.2, height=3.0)
    spectrum, used, local = axes[0]
    values = table.groupby("function")["eigenvalue"].mean()
    spectrum.loglog(values.index, values.where(values > 0), color=palette.REFERENCE)
    spectrum.set(xlabel="eigenfunction", ylabel="share of the trace", title="spectrum")
    modes, shares = distinct(table["mode"]), localisation(table)
    for k, mode in enumerate(modes):
        own = table[table["mode"] == mode.name]
        mean, band = means(own, "function", "used")
        used.semilogx(mean.index, mean, color=mode.colour, label=mode.label)
        if band is not None:
            edges = mean - band, mean + band
            used.fill_between(mean.index, *edges, color=mode.colour, alpha=0.25, lw=0)
        height, error = means(shares[shares["mode"] == mode.name], "mode", "share")
        dots, _ = means(shares[shares["mode"] == mode.name], "task", "share")
        style = {"color": mode.colour, "ecolor": palette.INK}
        local.bar(k, height, 0.6, yerr=error, **style)
        local.plot([k] * len(dots), dots, ".", color=palette.INK, ms=4)
    used.set(xlabel="leading eigenfunctions", ylabel=r"share of $\|J\tau\|^2$, %", title="use")
    used.legend()
    local.axhline(
        100 * shares["even"].mean(), color=palette.REFERENCE, ls=":", label="spread evenly"
    )
    named(local, [mode.label for mode in modes])
    local.set(ylabel="on examples of the own task, %", ylim=(0, 100), title="localisation")
    if shares["error"].any():
        local.set_xlabel("kernel estimated: moved towards an even spread")
    local.legend()
    return figure
