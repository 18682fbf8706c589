"""How similar features stay to the pre-trained ones: CKA before and after each task's edit.

Source: arXiv:1905.00414, the linear centred kernel alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tangent_arithmetic.analysis.edits import Edits, joined
from tangent_arithmetic.analysis.figures import heat, in_paper, panels
from tangent_arithmetic.arithmetic.eigenfunctions import cka
from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.arithmetic.sweeps import logits_at
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.run import Run

IMAGES = 256  # of each data set


def sampled(run: Run) -> Run:
    """The run on at most `IMAGES` of each data set."""
    return run.at_most(IMAGES)


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """CKA of the pre-trained and each fine-tuned model's features, on test images of all tasks.

    At most `IMAGES` of each data set, or `--sample`.

    Returns:
        Columns mode, task (fine-tuned on), "images of" (a task or the control set), cka.
    """
    few = sampled(run)
    names = [*run.tasks, *([run.control_set] if run.control_set else [])]
    rows = []
    for mode in modes:
        edits = Edits(few, mode, run.tasks)
        for name in names:
            start, *after = features(edits, name)
            for task, moved in zip(run.tasks, after, strict=True):
                rows.append((mode, task, name, cka(start, moved)))
    return pd.DataFrame(rows, columns=["mode", "task", "images of", "cka"])


@torch.no_grad()
def features(edits: Edits, name: str) -> list[Tensor]:
    """The features of a split at theta0, and with each task vector alone; of all ranks."""
    split, vectors = edits.split(name), list(edits.vectors.values())
    if is_linear(edits.base):
        found = linear_features(edits.base, vectors, split.batches, split.compute, split.cache)
        moved = (found.f0 + step for step in found.directions)
        return [joined([values]) for values in (found.f0, *moved)]
    points = [[], *([(1.0, tau)] for tau in vectors)]
    parts: list[list[Tensor]] = [[] for _ in points]
    passes = logits_at(edits.base, points, nn.Identity(), split.batches, split.compute)
    for i, values, _ in passes:
        parts[i].append(values.cpu())
    return [joined(part) for part in parts]


def draw(table: pd.DataFrame, run: Run) -> Any:
    """A heat map a mode, on one scale."""
    modes = distinct(table["mode"])
    figure, axes = panels(1, len(modes), width=3.25, height=3.3)
    low = float(table["cka"].min())
    for axis, mode in zip(axes[0], modes, strict=True):
        own = table[table["mode"] == mode.name]
        rows, columns = (list(dict.fromkeys(own[column])) for column in ("images of", "task"))
        square = own.pivot(index="images of", columns="task", values="cka").loc[rows, columns]
        image = heat(axis, square, (low, 1.0), written=not in_paper())
        axis.set(title=mode.label, xlabel="fine-tuned on")
    axes[0][0].set_ylabel("images of")
    place = {"location": "bottom", "aspect": 40} if in_paper() else {"location": "right"}
    figure.colorbar(image, ax=axes[0], **place).set_label("CKA with the pre-trained features")
    return figure
