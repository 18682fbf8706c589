"""Files of analysis tables: tidy CSV, with LaTeX and provenance as JSON beside it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

from tangent_arithmetic.data.own.sources import plain_name
from tangent_arithmetic.run.latex import booktabs
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import optional_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import as_json, write_json, write_text
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.reading import readable

LONGEST = 100  # rows of a table in LaTeX
# columns that hold names, which may look like numbers or missing values
NAMES = ("task", "task1", "task2", "tasks", "images of", "layer", "row")
SETS = ("target", "c", "b", "a", "w")  # columns of these tables that hold names too
TARGETS = ("analogies", "analogies_few")
# flags that every table depends on, and those of single tables
COMMON = ("tasks", "sample", "precision", "head", "template")
FLAGS = {
    "disentanglement": ("pairs", "grid_points"),
    "xi": ("pairs", "grid_points"),
    "negation_random": ("control_dataset", "control_threshold", "n_eval_points"),
    "subsets": ("n_eval_points", "subset_sample"),
    "analogies": ("analogies", "n_eval_points"),
    "analogies_few": ("analogies", "n_eval_points", "shots"),
    "kernel": ("kernel_images", "kernel_directions"),
}
MADE_BY = {  # the analyses of tables with another name
    "layers": "similarity",
    "xi": "disentanglement",
    "negation_random": "negation",
    "analogies_few": "few",
}


def table_path(run: Run, name: str) -> Path:
    """The CSV file of an analysis."""
    return run.results / "analysis" / f"{name}.csv"


def write_table(run: Run, name: str, table: pd.DataFrame, seconds: float) -> Path:
    """Writes a table, and beside it LaTeX and its provenance; returns the table's path."""
    path, facts = table_path(run, name), provenance(run, seconds)
    write_text(path, table.to_csv(index=False))
    write_json(path.with_suffix(".json"), facts)
    write_latex(run, name, table)
    return path


def write_latex(run: Run, name: str, table: pd.DataFrame) -> None:
    """Writes a table of at most `LONGEST` rows as LaTeX beside its CSV; longer ones are figures."""
    path = table_path(run, name).with_suffix(".tex")
    if len(table) <= LONGEST:
        write_text(path, latex(table))
    else:
        path.unlink(missing_ok=True)


def latex(table: pd.DataFrame) -> str:
    """A table in LaTeX, numbers to the right."""
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    numeric = [pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]
    return booktabs([*map(str, table.columns)], rows, numeric)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def read_table(run: Run, name: str) -> pd.DataFrame:
    """Reads a table that `write_table` wrote.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged; names the command that makes it.
    """
    path = table_path(run, name)
    if not path.is_file():
        made_by = command("analyze", run, name=MADE_BY.get(name, name))
        raise MissingFileError(f"no table at {path}. Make it with: {made_by}")
    with of_table(run, name):
        return read_csv(path)


def read_csv(path: Path) -> pd.DataFrame:
    """Reads a CSV file of `write_table`: a task may be called 2019 or NA, an empty cell is NaN."""
    names = [*NAMES, *(SETS if path.stem in TARGETS else [])]
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""], "encoding": "utf-8"}
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), **options)


def read_own(run: Run, name: str) -> pd.DataFrame:
    """Reads a table that was made with this run's settings, see `COMMON` and `FLAGS`.

    A setting that its provenance does not record counts as the same.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged or was made with other settings.
    """
    table, path = read_table(run, name), table_path(run, name)
    with of_table(run, name):
        recorded = optional_results(path.with_suffix(".json")).get("config", {})
        now = as_json(vars(run.config))
        flags = [flag for flag in (*COMMON, *FLAGS.get(name, ())) if flag in recorded]
        differ = [f for f in flags if _setting(run, f, recorded[f]) != _setting(run, f, now[f])]
    if differ:
        other = ", ".join(f"--{flag.replace('_', '-')}" for flag in differ)
        made_by = command("analyze", run, name=MADE_BY.get(name, name))
        raise UsageError(
            f"{path} was made with another {other}, as its .json says. Set the same, or make it "
            f"again with: {made_by}"
        )
    return table


def _setting(run: Run, flag: str, value: Any) -> Any:
    """A flag's value, or for names of data sets what it stands for."""
    if flag == "tasks":
        return [plain_name(name).removesuffix("Val") for name in value or run.suite.tasks]
    if flag == "control_dataset":
        return plain_name(value).removesuffix("Val") if value else run.suite.control
    return value


def of_table(run: Run, name: str) -> AbstractContextManager[None]:
    """Turns errors caused by a damaged table into a `UsageError` that names its command."""
    made_by = command("analyze", run, name=MADE_BY.get(name, name))
    return readable(table_path(run, name), f"the table that {made_by} makes")
