"""Tables of several seeds together: mean and standard deviation, beside the error of the images.

Each seed's own tables are made by `analyze --seed=N`. The standard deviation is over seeds of
fine-tuning, on the same images; the binomial standard error is that of one seed's accuracy on so
many images, after Wilson, for a mean over tasks an upper bound. Neither includes the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis import cka, ensembles, kernel, palette
from tangent_arithmetic.analysis.figures import panels
from tangent_arithmetic.analysis.intervals import binomial_error
from tangent_arithmetic.analysis.tables import read_own
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.modes import distinct
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import siblings
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summed:
    """What is averaged of a table.

    Attributes:
        keys: columns that tell the rows of the summary apart; others are averaged within a seed.
        values: columns to summarise, each with the test images that an accuracy is of: of "all"
            tasks, of all "targets", of the "target" of its row, or of the "control" set; None for
            values that are no accuracies.
    """

    keys: tuple[str, ...]
    values: Mapping[str, str | None]


MEAN = " (mean)"  # of the targets of a table
# by name of the table
SUMMED = {
    "subsets": Summed(("mode", "num_vectors"), {"absolute": "all", "normalised": None}),
    "analogies": Summed(("mode", "target", "vector", "chosen"), {"accuracy": "target"}),
    f"analogies{MEAN}": Summed(("mode", "vector", "chosen"), {"accuracy": "targets"}),
    "xi": Summed(("mode", "task1", "task2"), {"xi": None}),
    "negation_random": Summed(("mode", "vector"), {"target": "all", "control": "control"}),
    "ensembles": Summed(
        ("mode", "coefficient"), {"weights": "all", "ensemble": "all", "gap": None}
    ),
}
# by name of a table that is of fewer images than the run: the run on these
SAMPLED: dict[str, Callable[[Run], Run]] = {
    "kernel": kernel.sampled,
    "cka": cka.sampled,
    "ensembles": ensembles.sampled,
}


# columns of numbers that tell rows apart; other numbers with a point are averaged
COEFFICIENTS = {
    "disentanglement": ["coef1", "coef2"],
    "ensembles": ["coefficient"],
    "negation": ["coefficient"],
}


def of_seeds(runs: Sequence[Run], name: str) -> pd.DataFrame:
    """A table of all runs that have it, with the column seed; empty if none has.

    One that was made with other settings, or is damaged, is left out with a warning.
    """
    parts = []
    for one in runs:
        try:
            parts.append(read_own(one, name).assign(seed=one.seed))
        except MissingFileError:
            continue
        except UsageError as error:
            logger.warning("seed %d is left out: %s", one.seed, error)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def shared(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """What every seed has of a table of several, see `of_seeds`; the rest costs a warning.

    Returns:
        The rows that every seed has, with the columns of `averageable` if there are several seeds;
        values that one lacks are NaN in all.

    Raises:
        UsageError: if the seeds have no row in common.
    """
    seeds = table["seed"].nunique()
    table = averageable(table, name) if seeds > 1 else table
    lacking = table.drop(columns="seed").isna().groupby(table["seed"]).all()
    some = [*lacking.columns[lacking.any() & ~lacking.all()]]
    table = table.drop(columns=some)
    keys, values = _split(table, name)
    rows = table.groupby(keys, sort=False, dropna=False)
    kept = rows["seed"].transform("nunique") == seeds
    if some or not kept.all():
        lost = f"{(~kept).sum()} of {len(table)} rows" if not kept.all() else ""
        left = ", ".join(filter(None, [*some, lost]))
        logger.warning("%s: not every seed has %s, left out of the means", name, left)
    if not kept.any():
        raise UsageError(f"the tables {name} of {seeds} seeds have no row in common")
    known = rows[values].transform("count") >= seeds
    return table.assign(**{value: table[value].where(known[value]) for value in values})[kept]


def averaged(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The means over seeds of a table of `shared`; of several with standard deviations, "X std"."""
    keys, values = _split(table, name)
    groups = table.groupby(keys, sort=False, dropna=False)[values]
    means = groups.mean().reset_index()[[c for c in table.columns if c != "seed"]]
    if table["seed"].nunique() == 1:
        return means
    return pd.concat([means, groups.std().reset_index(drop=True).add_suffix(" std")], axis=1)


def _split(table: pd.DataFrame, name: str) -> tuple[list[str], list[str]]:
    """The columns that tell the rows of a seed apart, and those of values."""
    columns = [column for column in table.columns if column != "seed"]
    others = COEFFICIENTS.get(name, [])
    values = [c for c in columns if pd.api.types.is_float_dtype(table[c]) and c not in others]
    return [column for column in columns if column not in values], values


def averageable(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The columns of a table whose means over seeds mean something.

    Not eigenfunctions by their rank, see `kernel.curves`, nor the ends of intervals over images.
    """
    if name == "kernel":
        return kernel.curves(table)
    return table.drop(columns=["low", "high"]) if name == "xi" else table


def table(run: Run, modes: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the tables of `SUMMED`.

    Returns:
        Columns table, mode, row (the other keys), value (the column's name), mean, std (over seeds;
        empty for one), seeds, binomial (standard error on the images, see `binomial_error`; empty
        for what is no top-1 accuracy).

    Raises:
        MissingFileError: if no seed has such a table with one of the modes.
    """
    runs, parts = siblings(run), []
    names = dict.fromkeys(name.removesuffix(MEAN) for name in SUMMED)
    tables = {name: of_seeds(runs, name) for name in names}
    for name, what in SUMMED.items():
        found = tables[name.removesuffix(MEAN)]
        found = found[found["mode"].isin(modes)] if len(found) else found
        if len(found):
            parts.append(summed(sampled(run, name), found, what).assign(table=name))
    if not parts:
        made_by = command("analyze", run, name="subsets")
        raise MissingFileError(
            f"no tables of {', '.join(modes)} to summarise; make them first, such as by {made_by}"
        )
    columns = ["table", "mode", "row", "value", "mean", "std", "seeds", "binomial"]
    return pd.concat(parts, ignore_index=True)[columns]


def summed(run: Run, table: pd.DataFrame, what: Summed) -> pd.DataFrame:
    """The summary of one table, see `table`; of a run with the sample that the table is of."""
    keys, rows = list(what.keys), []
    sets = {"all": run.tasks, "control": [run.control_set], "targets": table.get("target")}
    by_seed = table.groupby([*keys, "seed"], sort=False)[list(what.values)].mean()
    for key, part in by_seed.groupby(keys, sort=False):
        named = dict(zip(keys, key, strict=True))
        sets["target"] = [named.get("target")]
        for value, on in what.values.items():
            mean = part[value].mean()
            rows.append(
                {
                    "mode": named["mode"],
                    "row": ", ".join(str(named[k]) for k in keys[1:]),
                    "value": value,
                    "mean": mean,
                    "std": part[value].std() if len(part) > 1 else None,
                    "seeds": len(part),
                    "binomial": binomial(run, mean, sets[on]) if on else None,
                }
            )
    return pd.DataFrame(rows)


def binomial(run: Run, accuracy: float, names: Iterable[str]) -> float | None:
    """The standard error of an accuracy on data sets; None where one has several labels an image.

    Its main metric is the mean average precision then, see `arithmetic.metrics`.
    """
    names = set(names)
    if any(labels_of(run.data.dataset(name).test).ndim > 1 for name in names):
        return None
    return binomial_error(accuracy, images(run, names))


def images(run: Run, names: Iterable[str]) -> int:
    """The number of test images whose binomial error bounds that of a mean over data sets."""
    sizes = [len(run.data.dataset(name).test) for name in set(names)]
    return len(sizes) * min(run.config.sample or max(sizes), *sizes)


def sampled(run: Run, name: str) -> Run:
    """The run on the images that a table is of."""
    return SAMPLED[name](run) if name in SAMPLED else run


def examples(run: Run, name: str) -> str:
    """What captions say of the images that a table is of; nothing if these are all."""
    if name not in SAMPLED:
        return run.examples
    return f", at most {sampled(run, name).config.sample} examples of each split"


def seeds_of(run: Run, table: pd.DataFrame) -> str:
    """The seeds that a table of a run is of, for captions."""
    if "seeds" in table:
        count = table["seeds"].max()
        return f"{count} seed{'s' if count > 1 else ''}"
    numbers = sorted(set(table["seed"])) if "seed" in table else [run.seed]
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def draw(table: pd.DataFrame, run: Run) -> Any:
    """Subsets by size, and analogies by vector, or without these every table's first value.

    Bands over seeds, bars of the images alone.
    """
    known = list(dict.fromkeys(table["table"]))
    drawn = [name for name in ("subsets", f"analogies{MEAN}") if name in known] or known
    figure, axes = panels(1, len(drawn), width=4.4, height=3.5)
    for axis, name in zip(axes[0], drawn, strict=True):
        value = next(iter(SUMMED[name].values))
        part = table[(table["table"] == name) & (table["value"] == value)]
        rows = list(dict.fromkeys(map(str, part["row"])))
        rows = sorted(rows, key=int) if name == "subsets" else rows
        places, scale = {row: i for i, row in enumerate(rows)}, 1 if value == "xi" else 100
        for mode in distinct(part["mode"]):
            own = part[part["mode"] == mode.name]
            own = own.assign(place=[places[str(row)] for row in own["row"]]).sort_values("place")
            x, mean = own["place"], scale * own["mean"]
            style = {"color": mode.colour, "marker": mode.marker, "ms": 4, "label": mode.label}
            axis.errorbar(x, mean, scale * own["binomial"].astype(float), **style)
            spread = scale * own["std"].astype(float).fillna(0)
            axis.fill_between(x, mean - spread, mean + spread, color=mode.colour, alpha=0.25, lw=0)
        labels = [str(row).replace(", -", "") for row in places]
        turned = {"rotation": 60, "ha": "right"} if name != "subsets" else {}
        axis.set_xticks(range(len(places)), labels, **turned)
        axis.set_title(name.removesuffix(MEAN))
        axis.set_ylabel("test accuracy, %" if value != "xi" else "disentanglement error")
    axes[0][0].legend()
    note = "bands: standard deviation over seeds; bars: binomial standard error of the examples"
    figure.supxlabel(note, fontsize="small", color=palette.INK)
    return figure
