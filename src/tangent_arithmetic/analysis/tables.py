"""Files of analysis tables: tidy CSV, with LaTeX and provenance as JSON beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd

from tangent_arithmetic.run.latex import booktabs
from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.results import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import MissingFileError
from tangent_arithmetic.storage.reading import readable

LONGEST = 100  # rows of a table in LaTeX
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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
        return pd.read_csv(path, encoding="utf-8")


def of_table(run: Run, name: str) -> AbstractContextManager[None]:
    """Turns errors caused by a damaged table into a `UsageError` that names its command."""
    made_by = command("analyze", run, name=MADE_BY.get(name, name))
    return readable(table_path(run, name), f"the table that {made_by} makes")
