"""What a run has measured, for claims to be compared with."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.tables import read_own
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import collect


class Evidence:
    """The results of one seed.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._tables: dict[str, pd.DataFrame] = {}

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return collect([self.run])

    def figure(self, kind: str, mode: str, key: str) -> float:
        """A figure of the summary, such as ("addition", "linear", "normalised").

        Raises:
            LookupError: if it is not known.
        """
        value = self._summary[kind].get(mode, {}).get(key, {}).get("mean")
        if value is None:
            raise LookupError(f"no {kind} of {mode}")
        return float(value)

    def table(self, name: str, **where: Any) -> pd.DataFrame:
        """An analysis table, or its rows with these values.

        Raises:
            LookupError: if there are no such rows.
            UsageError: if there is no table, or it is damaged or of other settings.
        """
        if name not in self._tables:
            self._tables[name] = read_own(self.run, name)
        found = self._tables[name]
        for column, value in where.items():
            found = found[found[column] == value]
        if found.empty:
            raise LookupError(f"no rows of {where} in the table {name}")
        return found
