"""Analysis tables as text in LaTeX: accuracies in percent, means with their spread over seeds."""

from __future__ import annotations

import math

import pandas as pd

from tangent_arithmetic.analysis.single import ADVANTAGE
from tangent_arithmetic.run.latex import booktabs
from tangent_arithmetic.run.modes import MODES

STD = " std"  # ends the name of a column of standard deviations, after that of the means
# columns of accuracies and of shares of images, beside those that are called like a mode
PERCENT = {
    *("zeroshot", "zeroshot_control", "target", "control", "accuracy"),
    *("absolute", "normalised", "own_absolute", "own_normalised"),
    *("weights", "ensemble", "agreement"),
}
NAMES = {"num_vectors": "vectors", "num_images": "images", "task1": "task 1", "task2": "task 2"}


def latex(table: pd.DataFrame) -> str:
    """A table in LaTeX, numbers to the right.

    Args:
        table: may have standard deviations in columns "X std".
    """
    columns = [column for column in table.columns if not column.endswith(STD)]
    cells = [_cells(table, column) for column in columns]
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in columns]
    header = [_name(table, column) for column in columns]
    return booktabs(header, [list(row) for row in zip(*cells, strict=True)], numeric)


def _in_percent(table: pd.DataFrame, column: str) -> bool:
    known = column in PERCENT or _is_mode(column.removeprefix(ADVANTAGE))
    return known and pd.api.types.is_float_dtype(table[column])


def _is_mode(name: str) -> bool:
    return name.partition("+")[0] in MODES


def _label(mode: str) -> str:
    return MODES[mode].label


def _name(table: pd.DataFrame, column: str) -> str:
    mode = column.removeprefix(ADVANTAGE)
    if _is_mode(mode):
        name = _label(mode) if mode == column else f"advantage over {_label(mode)}"
    else:
        name = NAMES.get(column, column).replace("zeroshot", "zero-shot").replace("_", " ")
    return f"{name}, %" if _in_percent(table, column) else name


def _cells(table: pd.DataFrame, column: str) -> list[str]:
    values = table[column].tolist()
    if column in ("mode", "mode1", "mode2"):
        return [_label(value) if _is_mode(value) else str(value) for value in values]
    if not pd.api.types.is_float_dtype(table[column]):
        return [*map(str, values)]
    percent = _in_percent(table, column)
    spread = table.get(column + STD, pd.Series(math.nan, table.index)).tolist()
    return [_number(*pair, percent) for pair in zip(values, spread, strict=True)]


def _number(mean: float, std: float, percent: bool) -> str:
    scale, form = (100, ".1f") if percent else (1, ".3g")
    if math.isnan(mean):
        return "-"
    return " ± ".join(f"{scale * value:{form}}" for value in (mean, std) if not math.isnan(value))
