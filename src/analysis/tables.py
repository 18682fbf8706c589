"""Tables of analyses on disk: tidy CSV, with what made them beside it as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd

from src.checkpoints import write_text
from src.errors import MissingFileError
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
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
    return path


def read_table(args: Any, name: str) -> pd.DataFrame:
    """A table that was written.

    Raises:
        MissingFileError: if it was not.
    """
    path = table_path(args, name)
    if not path.is_file():
        made_by = command("analyze", args, name=name)
        raise MissingFileError(f"no table at {path}. Make it with: {made_by}")
    return pd.read_csv(io.StringIO(path.read_text(encoding="utf-8")))
