r"""Ensembles of the tasks' models beside the sum of their weights, at the same coefficients.

\[ f_0 + a \sum_t (f(x; \theta_0 + \tau_t) - f_0) \quad \text{and} \quad
   f(x; \theta_0 + a \sum_t \tau_t) \]

With T tasks, \(a = 1/T\) is the mean of the models' outputs and of their weights. Outputs are the
features, before the head normalises them. For linear models the two are equal; both are computed by
passes of the models, none of them from the other.

Source: arXiv:2305.12827, section 3; arXiv:2405.16350 on ensembles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tangent_arithmetic.analysis.edits import Edits, joined
from tangent_arithmetic.analysis.figures import means, panels
from tangent_arithmetic.arithmetic.sweeps import Split, logits_at
from tangent_arithmetic.arithmetic.tally import measured
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.statedict import State

IMAGES = 128  # of each task
COEFS = (0.25, 0.5, 0.75, 1.0)  # beside 1/T


def sampled(run: Run) -> Run:
    """The run on at most `IMAGES` of each task."""
    return run.at_most(IMAGES)


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Accuracies of both on test images of each task, at most `IMAGES` or `--sample`.

    Returns:
        Columns mode, task (whose images), coefficient, weights, ensemble (accuracies), agreement
        (share of images with the same class), gap (largest difference of an image's features,
        relative to their norm).
    """
    few = sampled(run)
    coefs = sorted({1 / len(run.tasks), *COEFS})
    rows: list[dict[str, Any]] = []
    for mode in modes:
        edits = Edits(few, mode, run.tasks)
        for task in run.tasks:
            for row in compare(edits.base, list(edits.vectors.values()), edits.split(task), coefs):
                rows.append({"mode": mode, "task": task, **row})
    return pd.DataFrame(rows)


def compare(
    encoder: Encoder, vectors: Sequence[State], split: Split, coefs: Sequence[float]
) -> list[dict[str, float]]:
    """The sum of the weights against the ensemble on a split, as rows of `table`.

    Args:
        encoder: at theta0, standard or linear; left unchanged.
        vectors: the task vectors.
        split: the images and the head.
        coefs: the coefficients.
    """
    alone = [[(1.0, tau)] for tau in vectors]
    sums = [[(coef, tau) for tau in vectors] for coef in coefs]
    outputs, labels = _outputs(encoder, [[], *alone, *sums], split)
    f0, single, summed = outputs[0], outputs[1 : 1 + len(alone)], outputs[1 + len(alone) :]
    step = (single - f0).sum(dim=0)
    rows = []
    for coef, weights in zip(coefs, summed, strict=True):
        ensemble = f0 + coef * step
        one, other = (split.head.cpu()(value.float()) for value in (weights, ensemble))
        gap = (weights - ensemble).norm(dim=1) / ensemble.norm(dim=1)
        rows.append(
            {
                "coefficient": coef,
                "weights": next(iter(measured(one, labels).values())),
                "ensemble": next(iter(measured(other, labels).values())),
                "agreement": float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean()),
                "gap": float(gap.max()),
            }
        )
    return rows


@torch.no_grad()
def _outputs(
    encoder: Encoder, points: Sequence[Sequence[tuple[float, State]]], split: Split
) -> tuple[Tensor, Tensor]:
    """Features at each point, of shape (points, images, features), and labels; of all ranks."""
    parts: list[list[Tensor]] = [[] for _ in points]
    labels = []
    passes = logits_at(encoder, points, nn.Identity(), split.batches, split.compute)
    for i, values, truth in passes:
        parts[i].append(values.cpu())
        if i == 0:
            labels.append(truth.cpu())
    return torch.stack([joined(part) for part in parts]), joined(labels)


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Accuracy of both against the coefficient, mean of the tasks; and their gap.

    Bars are the standard deviation of that mean over seeds, where the table has several.
    """
    figure, axes = panels(1, 2, width=3.6, height=3.2)
    left, right = axes[0]
    for mode in distinct(table["mode"]):
        rows = table[table["mode"] == mode.name]
        for column, line in (("weights", "-"), ("ensemble", ":")):
            label = mode.label if column == "weights" else None
            mean, error = means(rows, "coefficient", column)
            style: dict[str, Any] = {"marker": mode.marker, "color": mode.colour, "ms": 4}
            left.errorbar(mean.index, mean, error, ls=line, label=label, **style)
        gap = rows.groupby("coefficient")["gap"].max()
        right.semilogy(gap.index, gap, marker=mode.marker, ms=4, color=mode.colour)
    left.plot([], [], ":", color="black", label="ensemble")
    left.set(xlabel="coefficient", ylabel="test accuracy, mean of the tasks, %")
    left.legend()
    right.set(xlabel="coefficient", ylabel="largest relative difference of outputs")
    return figure
