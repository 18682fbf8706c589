"""Files of analysis tables: tidy CSV, with provenance as JSON beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd

from tangent_arithmetic.run.models import command
from tangent_arithmetic.run.results import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import MissingFileError
from tangent_arithmetic.storage.reading import readable


def table_path(run: Run, name: str) -> Path:
    """The CSV file of an analysis."""
    return run.results / "analysis" / f"{name}.csv"


def write_table(run: Run, name: str, table: pd.DataFrame, seconds: float) -> Path:
    """Writes a table, and its provenance beside it; returns the table's path."""
    path, facts = table_path(run, name), provenance(run, seconds)
    write_text(path, table.to_csv(index=False))
    write_json(path.with_suffix(".json"), facts)
    return path


def read_table(run: Run, name: str) -> pd.DataFrame:
    """Reads a table that `write_table` wrote.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it is damaged; names the command that makes it.
    """
    path = table_path(run, name)
    if not path.is_file():
        made_by = command("analyze", run, name=name)
        raise MissingFileError(f"no table at {path}. Make it with: {made_by}")
    with of_table(run, name):
        return pd.read_csv(path, encoding="utf-8")


def of_table(run: Run, name: str) -> AbstractContextManager[None]:
    """Turns errors caused by a damaged table into a `UsageError` that names its command."""
    made_by = command("analyze", run, name=name)
    return readable(table_path(run, name), f"the table that {made_by} makes")
