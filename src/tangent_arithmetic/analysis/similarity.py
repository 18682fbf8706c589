"""The geometry of task vectors: cosine similarities, norms, and shares of each layer.

Source: arXiv:2212.04089, the cosine similarities between task vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import NARROW, heat, legend_below, panels, spread_of
from tangent_arithmetic.run.modes import MODES, distinct, in_order, trained
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.statedict import State

LIMIT = 0.1  # the colour scale of cosines is from -LIMIT to LIMIT


def layer_of(name: str) -> str:
    """The layer that a weight belongs to: up to its first number, or its module.

    >>> layer_of("model.visual.transformer.resblocks.3.attn.in_proj_weight")
    'resblocks.3'
    >>> layer_of("model.visual.ln_post.bias")
    'ln_post'
    """
    if numbered := re.search(r"([^.]+\.\d+)\.", name):
        return numbered[1]
    parts = name.removeprefix("model.visual.").split(".")
    return ".".join(parts[:-1]) or parts[0]


def table(run: Run, modes: Sequence[str] | None = None) -> pd.DataFrame:
    """Cosine similarities between all pairs of fine-tuned vectors, and their norms.

    Returns:
        Columns mode1, task1, mode2, task2, cosine (NaN if a vector is 0), norm1, norm2.
    """
    rows = []
    flat = {key: _flat(tau) for key, tau in _vectors(run, modes).items()}
    norms = {key: float(value.norm()) for key, value in flat.items()}
    for one, x in flat.items():
        for other, y in flat.items():
            product = norms[one] * norms[other]
            cosine = float(x @ y) / product if product else math.nan
            rows.append((*one, *other, cosine, norms[one], norms[other]))
    columns = ["mode1", "task1", "mode2", "task2", "cosine", "norm1", "norm2"]
    return pd.DataFrame(rows, columns=columns)


def layers(run: Run, modes: Sequence[str] | None = None) -> pd.DataFrame:
    """The share of each layer in the squared norm of each fine-tuned vector.

    Returns:
        Columns mode, task, layer, share (in [0, 1]; NaN for a vector of 0), norm (of the layer's
        part).
    """
    rows: list[tuple[str, str, str, float, float]] = []
    for (mode, task), tau in _vectors(run, modes).items():
        squares: dict[str, float] = {}
        for name, value in tau.items():
            layer = layer_of(name)
            squares[layer] = squares.get(layer, 0.0) + float(value.double().square().sum())
        total = sum(squares.values())
        shares = {layer: s / total if total else math.nan for layer, s in squares.items()}
        rows += [(mode, task, layer, shares[layer], s**0.5) for layer, s in squares.items()]
    return pd.DataFrame(rows, columns=["mode", "task", "layer", "share", "norm"])


def _vectors(run: Run, modes: Sequence[str] | None) -> dict[tuple[str, str], State]:
    """Task vectors by mode and task."""
    chosen = trained() if modes is None else in_order(MODES[mode].training.name for mode in modes)
    by_mode = {mode: Edits(run, mode, run.tasks).vectors for mode in chosen}
    return {(mode, task): tau for mode, taus in by_mode.items() for task, tau in taus.items()}


def _flat(tau: State) -> torch.Tensor:
    floats = [tau[name] for name in sorted(tau) if tau[name].is_floating_point()]
    return torch.cat([value.double().flatten() for value in floats])


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Cosine similarities within each mode, and the norms; the diagonal of ones is masked."""
    modes = distinct(table["mode1"])
    width = 3.9 if len(modes) < 3 else NARROW - 0.05  # in a paper, two side by side
    figure, axes = panels(1, len(modes) + 1, width=width, height=3.6)
    lengths, errors = {}, {}
    for axis, mode in zip(axes[0], modes, strict=False):
        own = table[table["mode1"] == mode.name]
        part = own[own["mode2"] == mode.name]
        order = list(dict.fromkeys(part["task1"]))
        square = part.pivot(index="task1", columns="task2", values="cosine").loc[order, order]
        square = square.mask(np.eye(len(order), dtype=bool))
        image = heat(axis, square, (-LIMIT, LIMIT), palette.SIGNED, written=True)
        axis.set_title(f"cosine, {mode.label} (diagonal of 1 masked)")
        lengths[mode.label] = own.groupby("task1", sort=False)["norm1"].first()
        if "norm1 std" in own:
            errors[mode.label] = own.groupby("task1", sort=False)["norm1 std"].first()
    label = f"cosine{spread_of(table, 'cosine')}"
    figure.colorbar(image, ax=axes[0][len(modes) - 1], extend="both", label=label)
    style = {"color": [mode.colour for mode in modes], "width": 0.75}
    bars = pd.DataFrame(errors) if errors else None
    pd.DataFrame(lengths).plot.barh(ax=axes[0][-1], xerr=bars, **style)
    axes[0][-1].invert_yaxis()
    axes[0][-1].set(title="norm of the task vector", ylabel="")
    axes[0][-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    return figure


def draw_layers(table: pd.DataFrame, run: Run) -> Any:
    """Mean share of each layer over the tasks, by mode; from the first layer to the last."""
    by = table.groupby(["mode", "layer"], sort=False)["share"].mean()
    modes = in_order(table["mode"])
    shares = 100 * pd.DataFrame({MODES[mode].label: by[mode] for mode in modes}).T
    shares = shares[sorted(shares.columns, key=_depth)]
    figure, axes = panels(1, 1, width=7.0, height=1.2 + 0.6 * len(shares))
    axis = axes[0][0]
    left = 0.0 * shares.iloc[:, 0]
    for layer, colour in zip(shares.columns, palette.ordered(len(shares.columns)), strict=True):
        style = {"color": colour, "edgecolor": "white", "linewidth": 0.5}
        axis.barh(list(shares.index), shares[layer], 0.7, left=left, label=layer, **style)
        left = left + shares[layer]
    axis.invert_yaxis()
    axis.set(xlabel="share of the squared norm, %, mean of tasks", xlim=(0, 100))
    legend_below(figure, axis, columns=5)
    return figure


def _depth(layer: str) -> tuple[int, int, str]:
    """Where a layer is: before the numbered ones, one of them, or after."""
    if (number := re.search(r"\.(\d+)$", layer)) is not None:
        return 1, int(number[1]), layer
    return (2 if re.search(r"post|proj$|head|fc|norm$", layer) else 0), 0, layer
