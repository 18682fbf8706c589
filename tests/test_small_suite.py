from __future__ import annotations

from pathlib import Path

import pytest

from tangent_arithmetic.data.embedded.rendering import load_embedded
from tests.small_suite import SIZES, TASKS, small_suite


@pytest.mark.parametrize("name", [*TASKS, "Shapes"])
def test_its_pictures_are_not_taken_for_the_true_ones(name: str, tmp_path: Path) -> None:
    """Both were once kept in the user's cache under one name."""
    with pytest.MonkeyPatch.context() as patch, small_suite(patch):
        small = load_embedded(name, tmp_path)
    true = load_embedded(name, tmp_path)
    assert len(small.train) == SIZES["train"] < len(true.train)
    assert len(small.test) == SIZES["test"] < len(true.test)
