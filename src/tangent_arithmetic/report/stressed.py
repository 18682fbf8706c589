"""What perturbed task vectors cost each merging method, as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import heat, panels
from tangent_arithmetic.merging.stress import TITLES

MOST = 20.0  # points lost at the darkest shade


def lost(found: Mapping[str, Any], key: str) -> pd.DataFrame:
    """Percentage points that each perturbation (columns) costs each method (rows).

    Args:
        found: as `merging.stress.stress` returns it.
        key: "plain" or "normalised".

    Returns:
        The points; NaN where the method refuses the perturbed vectors.
    """
    rows = {
        name: {label: 100 * cell.get("lost", float("nan")) for label, cell in cells.items()}
        for name, row in found["methods"].items()
        if (cells := row[key]["perturbed"])
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def draw(found: Mapping[str, Any]) -> Any:
    """A heat map for vectors as they are, and one for those of equal norms."""
    height = 3.0 + 0.19 * len(found["methods"])
    figure, axes = panels(1, len(TITLES), width=5.2, height=height, sharey=True)
    for axis, (key, title) in zip(axes[0], TITLES.items(), strict=True):
        image = heat(axis, lost(found, key), (0.0, MOST), palette.MAGNITUDE, written=True)
        axis.set_title(title)
    figure.colorbar(image, ax=axes[0], label="accuracy lost, points", extend="both", shrink=0.6)
    return figure
