"""What a run has measured, for claims to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis.negation import curves
from tangent_arithmetic.analysis.tables import modes_of, read_own, without
from tangent_arithmetic.run.modes import ZEROSHOT
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import collect


def figures_of(runs: Sequence[Run], modes: Sequence[str]) -> dict[str, Any]:
    """The summary of runs, see `collect`, without other modes than these and zero-shot."""
    kept, found = {ZEROSHOT.name, *modes}, collect(runs)
    if runs[0].control_set is None:
        found["negation"] = {}
    return {
        kind: {mode: one for mode, one in by_mode.items() if mode in kept}
        for kind, by_mode in found.items()
    }


def rows_of(table: pd.DataFrame, modes: Sequence[str]) -> pd.DataFrame:
    """What an analysis table has of these modes."""
    return without(table, [mode for mode in modes_of(table) if mode not in modes])


class Evidence:
    """The results of one seed.

    Args:
        run: the run.
        modes: whose results count; those of others may be of other settings.
    """

    def __init__(self, run: Run, modes: Sequence[str]) -> None:
        self.run, self.modes = run, modes
        self._tables: dict[str, pd.DataFrame] = {}

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return figures_of([self.run], self.modes)

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
            self._tables[name] = rows_of(read_own(self.run, name), self.modes)
        found = self._tables[name]
        for column, value in where.items():
            found = found[found[column] == value]
        if found.empty:
            raise LookupError(f"no rows of {where} in the table {name}")
        return found

    def negated(self, mode: str) -> pd.DataFrame:
        """Mean validation accuracies target and control by the coefficient of negation.

        Raises:
            LookupError: if the mode does not count.
            UsageError: if there are no negations, or they are damaged.
        """
        if mode not in self.modes:
            raise LookupError(f"no negation of {mode}")
        found = curves(self.run, [mode])
        found = found[found["seed"] == self.run.seed]
        return found.groupby("coefficient")[["target", "control"]].mean()
