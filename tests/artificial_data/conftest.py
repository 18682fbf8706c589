from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tangent_arithmetic.artificial_data import presets
from tangent_arithmetic.artificial_data.presets import BASE, DatasetSpec, Preset, Recipe
from tangent_arithmetic.artificial_data.workspace import Workspace

COMMON = {"n_samples": 400, "n_features": 12, "n_informative": 6, "n_redundant": 0,
          "n_clusters_per_class": 1, "class_sep": 3.0, "shuffle": False}  # fmt: skip
SHORT = Recipe(lr=3e-3, batch_size=32, epochs=8)
TINY = Preset(
    datasets={
        BASE: DatasetSpec(**COMMON, n_classes=4, random_state=1),  # type: ignore[arg-type]
        "dataset2": DatasetSpec(**COMMON, n_classes=3, random_state=2),  # type: ignore[arg-type]
        "dataset3": DatasetSpec(**COMMON, n_classes=3, random_state=3),  # type: ignore[arg-type]
        "dataset4": DatasetSpec(**COMMON, n_classes=3, random_state=4),  # type: ignore[arg-type]
    },
    base=SHORT,
    probe=SHORT,
    standard=SHORT,
    linear=SHORT,
)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Preset]:
    """Makes every preset a tiny one, with three tasks."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in presets.PRESETS:
            monkeypatch.setitem(presets.PRESETS, name, TINY)
        yield TINY


@pytest.fixture
def workspace(tiny: Preset, tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)
