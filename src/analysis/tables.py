"""Tables of analyses on disk: tidy CSV, with what made them beside it as JSON."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd

from src.checkpoints import write_json, write_text
from src.errors import MissingFileError
from src.reading import readable
from src.results import provenance
from src.runs import command
from src.settings import results_dir


def table_path(args: Any, name: str) -> Path:
    """The CSV file of an analysis."""
    return results_dir(args) / "analysis" / f"{name}.csv"


def write_table(args: Any, name: str, table: pd.DataFrame, seconds: float) -> Path:
    """Writes a table, and its provenance beside it; returns the table's path."""
    path, facts = table_path(args, name), provenance(args, seconds)
    write_text(path, table.to_csv(index=False))
    write_json(path.with_suffix(".json"), facts)
    return path


def read_table(args: Any, name: str) -> pd.DataFrame:
    """A table that was written.

    Raises:
        MissingFileError: if it was not.
        UsageError: if it is damaged; the command that makes it again is named.
    """
    path = table_path(args, name)
    if not path.is_file():
        made_by = command("analyze", args, name=name)
        raise MissingFileError(f"no table at {path}. Make it with: {made_by}")
    with of_table(args, name):
        return pd.read_csv(path, encoding="utf-8")


def of_table(args: Any, name: str) -> AbstractContextManager[None]:
    """Turns what goes wrong with a damaged table into an error that names it and its command."""
    made_by = command("analyze", args, name=name)
    return readable(table_path(args, name), f"the table that {made_by} makes")
