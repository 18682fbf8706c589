"""The one sentence that a figure's numbers say, computed from its table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tangent_arithmetic.run.modes import MODES, in_order

if TYPE_CHECKING:
    import pandas as pd

    from tangent_arithmetic.run.run import Run

logger = logging.getLogger(__name__)

LEAST = 4  # points of a grid that a mean is worth
KEPT = 0.95  # share of the control set's accuracy at which negations are compared


def takeaway(folder: Path, name: str, run: Run | None = None) -> str:
    """What the figure of an analysis says; empty without a sound table.

    Args:
        folder: holds the tables.
        name: the figure and its table, such as "subsets" or "subsets-A+B".
        run: whose checkpoints the table must be of; without it they are not compared.

    Returns:
        The sentence, or that the checkpoints have changed since.
    """
    from tangent_arithmetic.analysis.tables import analysis_of, modes_of, outdated, read_csv

    path = folder / f"{name}.csv"
    if not path.is_file():
        return ""
    try:
        table, analysis = read_csv(path), analysis_of(path)
        if run is not None and (stale := in_order(outdated(run, path, modes_of(table)))):
            labels = ", ".join(MODES[mode].label for mode in stale)
            return f"Of earlier checkpoints of {labels}: run the analysis again."
        return TAKEAWAYS[analysis](table) if analysis in TAKEAWAYS else ""
    except Exception as error:  # a damaged table, of any kind, costs the sentence alone
        logger.warning("%s has no takeaway: %s", path, error)
        return ""


def single(table: pd.DataFrame) -> str:
    """The mean gaps to standard fine-tuning, and the largest."""
    from tangent_arithmetic.analysis.single import ADVANTAGE

    parts, best = [], table["standard"]
    columns = (column for column in table.columns if not column.startswith(ADVANTAGE))
    for mode in in_order(set(columns) - {"standard"}):
        gaps, side = 100 * (best - table[mode]), "below"
        if gaps.mean() < 0:
            gaps, side = -gaps, "above"
        largest = f"largest gap: {table['task'][gaps.idxmax()]}, {gaps.max():.1f}"
        parts.append(f"{MODES[mode].label} {gaps.mean():.1f} points {side} ({largest})")
    return f"Against standard fine-tuning, on average: {'; '.join(parts)}." if parts else ""


def subsets(table: pd.DataFrame) -> str:
    """The mean of all tasks with one vector and with all."""
    most = table["num_vectors"].max()
    parts = []
    for mode in in_order(table["mode"]):
        means = 100 * table[table["mode"] == mode].groupby("num_vectors")["absolute"].mean()
        parts.append(f"from {means.loc[1]:.1f} to {means.loc[most]:.1f} % ({MODES[mode].label})")
    return f"From one vector to all {most} the mean of all tasks goes {_listed(parts)}."


def interference(table: pd.DataFrame) -> str:
    """The mean interference off the diagonal and on it, and the largest."""
    from tangent_arithmetic.analysis.interference import matrices
    from tangent_arithmetic.arithmetic.interference import means

    parts = [f"{MODES[mode].label}: {means(rows)}" for mode, rows in matrices(table).items()]
    return f"Mean interference by examples and vector. {'. '.join(parts)}."


def disentanglement(table: pd.DataFrame) -> str:
    """The mean error within the search range, where all modes have points, the lowest first."""
    inside = table[table["coef1"].between(0, 1) & table["coef2"].between(0, 1)]
    wide = inside.pivot_table(index=["coef1", "coef2"], columns="mode", values="error").dropna()
    if len(wide) < LEAST or set(wide) != set(table["mode"]):
        return ""
    parts = [
        f"{MODES[mode].label} {error:.2f}" for mode, error in wide.mean().sort_values().items()
    ]
    return f"Mean error at {len(wide)} points of the frame, lowest first: {', '.join(parts)}."


def similarity(table: pd.DataFrame) -> str:
    """The mean cosine between tasks, and the largest."""
    pairs = table[(table["mode1"] == table["mode2"]) & (table["task1"] != table["task2"])]
    means = pairs.groupby("mode1")["cosine"].mean()
    parts = [f"{means[mode]:.3f} ({MODES[mode].label})" for mode in in_order(pairs["mode1"])]
    top = pairs.loc[pairs["cosine"].abs().idxmax()]
    which = f"{top['task1']} and {top['task2']} ({MODES[top['mode1']].label})"
    return (
        f"Mean cosine between tasks: {', '.join(parts)}; farthest from 0: {top['cosine']:.2f}, "
        f"{which}."
    )


def layers(table: pd.DataFrame) -> str:
    """The layer with the largest share."""
    parts = []
    for mode in in_order(table["mode"]):
        shares = table[table["mode"] == mode].groupby("layer")["share"].mean()
        parts.append(f"{shares.idxmax()}, {100 * shares.max():.0f} % ({MODES[mode].label})")
    return f"Largest share of the squared norm: {'; '.join(parts)}."


def negation(table: pd.DataFrame) -> str:
    """How far the task falls on average while the mean control accuracy is kept."""
    from tangent_arithmetic.arithmetic.coefficients import least_kept

    parts, start = [], 0.0
    for mode in in_order(table["mode"]):
        means = table[table["mode"] == mode].groupby("coefficient")[["target", "control"]].mean()
        start = means["target"].loc[0.0]
        kept = means[means["control"] >= least_kept(KEPT, means["control"].loc[0.0])]
        parts.append(f"{100 * kept['target'].min():.1f} % ({MODES[mode].label})")
    return (
        f"With {100 * KEPT:.0f} % of the control accuracy kept, one common coefficient lowers the "
        f"task from {100 * start:.1f} to {_listed(parts)}."
    )


def negation_random(table: pd.DataFrame) -> str:
    """Accuracy on the task after negating its vector and a random one."""
    means = 100 * table.groupby(["vector", "mode"])["target"].mean()
    parts = [
        f"{means['task', mode]:.1f} or {means['random', mode]:.1f} % ({MODES[mode].label})"
        for mode in in_order(table["mode"])
    ]
    return f"The task after negation of its own vector or of a random one: {', '.join(parts)}."


def fronts(table: pd.DataFrame) -> str:
    """What the first pair's equal weights give up of each task against all weight for it."""
    pair = next(name for name in table["tasks"] if name.count("+") == 1)
    parts = []
    for mode in in_order(table["mode"]):
        own = table[(table["mode"] == mode) & (table["tasks"] == pair)]
        lost = [
            100 * (rows.loc[rows["weight"].idxmax(), "accuracy"] - _at(rows, 0.5))
            for _, rows in own.groupby("task", sort=False)
        ]
        parts.append(f"{' and '.join(f'{value:.1f}' for value in lost)} ({MODES[mode].label})")
    names = " and ".join(pair.split("+"))
    return (
        f"Against all weight for one of {names}, equal weights give up so many points of each: "
        f"{', '.join(parts)}."
    )


def _at(rows: pd.DataFrame, weight: float) -> float:
    """The accuracy at the weight nearest to one."""
    return float(rows.loc[(rows["weight"] - weight).abs().idxmin(), "accuracy"])


def analogies(table: pd.DataFrame) -> str:
    """The analogy without the target's images between zero-shot and the target's own vector."""
    parts = []
    for mode in in_order(table["mode"]):
        means = 100 * table[table["mode"] == mode].groupby(["vector", "chosen"])["accuracy"].mean()
        zero, own = means["zero-shot", "-"], means["target", "-"]
        analogy = means["c + b - a", "without target"]
        parts.append(f"{analogy:.1f} % ({MODES[mode].label}; {zero:.1f} zero-shot, {own:.1f} own)")
    return f"Without examples of the target, c + b - a reaches on average {', '.join(parts)}."


def analogies_few(table: pd.DataFrame) -> str:
    """In how many settings the analogy is the better start, and by how much."""
    wide = table.pivot(index=["target", "shots"], columns="start", values="accuracy")
    gains = 100 * (wide["analogy"] - wide["pre-trained model"])
    ahead = int((gains > 0).sum())
    return (
        f"The analogy is the better start in {ahead} of {len(gains)} settings; mean difference "
        f"{gains.mean():+.1f} points."
    )


def kernel(table: pd.DataFrame) -> str:
    """The localisation of the eigenfunctions that task vectors use."""
    from tangent_arithmetic.analysis.kernel import localisation

    local = localisation(table)
    means = 100 * local.groupby("mode")["share"].mean()
    parts = [f"{means[mode]:.0f} % ({MODES[mode].label})" for mode in in_order(table["mode"])]
    said = (
        f"Of the eigenfunctions that a task vector uses, {_listed(parts)} are on its own task's "
        f"examples, {100 * local['even'].mean():.0f} % if spread evenly."
    )
    if not local["error"].any():
        return said
    shift = 100 * local["shift"].mean()
    return (
        f"{said} The kernel is estimated, which moves this towards an even spread: half the "
        f"directions give {abs(shift):.1f} points {'less' if shift > 0 else 'more'}."
    )


def ensembles(table: pd.DataFrame) -> str:
    """The largest difference between an ensemble and the sum of the weights."""
    gaps = table.groupby("mode")["gap"].max()
    parts = [f"{gaps[mode]:.2g} ({MODES[mode].label})" for mode in in_order(table["mode"])]
    return f"Largest relative difference of an ensemble to the sum of weights: {_listed(parts)}."


def xi(table: pd.DataFrame) -> str:
    """The mean over pairs, the lowest first."""
    means = table.groupby("mode")["xi"].mean().sort_values()
    parts = [f"{MODES[mode].label} {value:.2f}" for mode, value in means.items()]
    return f"Mean of the pairs, lowest first: {', '.join(parts)}."


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


TAKEAWAYS: Mapping[str, Callable[[pd.DataFrame], str]] = {
    "single": single,
    "subsets": subsets,
    "interference": interference,
    "disentanglement": disentanglement,
    "xi": xi,
    "kernel": kernel,
    "ensembles": ensembles,
    "similarity": similarity,
    "layers": layers,
    "negation": negation,
    "negation_random": negation_random,
    "fronts": fronts,
    "analogies": analogies,
    "analogies_few": analogies_few,
}
