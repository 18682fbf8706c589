from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tangent_arithmetic.artificial_data import presets
from tangent_arithmetic.artificial_data.presets import BASE, DatasetSpec, Preset, Recipe
from tangent_arithmetic.artificial_data.workspace import Workspace

SHORT = Recipe(lr=3e-3, batch_size=32, epochs=8)
SPEC = DatasetSpec(
    n_samples=400,
    n_features=12,
    n_classes=3,
    n_informative=6,
    n_redundant=0,
    n_clusters_per_class=1,
    class_sep=3.0,
    shuffle=False,
)
TASKS = {f"dataset{i}": replace(SPEC, random_state=i) for i in (2, 3, 4)}
BASE_SPEC = replace(SPEC, n_classes=4, random_state=1)
TINY = Preset({BASE: BASE_SPEC, **TASKS}, base=SHORT, probe=SHORT, standard=SHORT, linear=SHORT)


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
