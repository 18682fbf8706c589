"""Published figures: their own sums, their marks, the models that they are of."""

from __future__ import annotations

import pytest

from src.analysis.published import COLUMNS, MODELS, rows
from src.tasks import SUITES


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", COLUMNS)
def test_each_model_has_figures_of_each_kind(kind: str, model: str) -> None:
    found = rows(kind, model)
    assert {"zero-shot", "standard", "linear"} <= {row.label for row in found}
    assert len({(row.label, row.source) for row in found}) == len(found)
    for row in found:
        assert row.cells and set(row.cells) <= set(COLUMNS[kind])
        assert all(0 < cell.value < 100 for cell in row.cells.values())


@pytest.mark.parametrize("model", MODELS)
def test_the_means_are_those_of_the_tasks(model: str) -> None:
    for row in rows("single", model):
        tasks = [cell.value for name, cell in row.cells.items() if name != "mean"]
        assert len(tasks) == 8
        assert row.cells["mean"].value == pytest.approx(sum(tasks) / 8, abs=0.06)


def test_the_tasks_are_the_suite_s() -> None:
    assert set(COLUMNS["single"]) == {*SUITES["clip8"].tasks, "mean"}


def test_what_was_recalled_is_marked() -> None:
    cells = {(r.label, r.source): r.cells for r in rows("addition", "ViT-L-14")}
    linear = cells["linear", "arXiv:2305.12827"]
    assert (linear["absolute"].value, linear["absolute"].verified) == (88.5, True)
    assert (linear["normalised"].value, linear["normalised"].verified) == (93.5, False)
    unverified = [
        cell for kind in COLUMNS for model in MODELS for row in rows(kind, model)
        for cell in row.cells.values() if not cell.verified
    ]  # fmt: skip
    assert len(unverified) == 3 * 7 - 1 + 3 * 6 + 4 + 4 + 5


def test_other_weights_have_none() -> None:
    for model in ("ViT-Nano-8", "ViT-B-32__pretrained__laion2b_s34b_b79k", "ViT-B-32__init__"):
        assert rows("single", model) == []
    same = rows("single", "ViT-B-32")
    assert rows("single", "ViT-B-32__pretrained__openai") == same != []
    assert rows("single", "ViT-B-32-quickgelu") == same
