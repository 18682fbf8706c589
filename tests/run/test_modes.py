"""A mode registered from outside goes through every command; the table refuses twins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, NonLinearTaskVector
from tangent_arithmetic.commands import add, evaluate, finetune, negate
from tangent_arithmetic.run.modes import (
    MODES,
    Mode,
    edited,
    get_mode,
    in_order,
    linear,
    register_mode,
    require_mode,
    trained,
)
from tangent_arithmetic.runtime.errors import UsageError
from tests.small_suite import TASKS, flags, small_suite


@pytest.fixture
def mine() -> Iterator[Mode]:
    """A mode of a user: linear fine-tuning, its vectors added to the standard model."""
    mode = register_mode(
        Mode("mine", "my mode", "mine_", colour="#009e73", marker="D", trained_by="linear")
    )
    yield mode
    del MODES["mine"]


def test_the_table_says_what_each_mode_is() -> None:
    assert list(MODES) == ["none", "standard", "linear", "posthoc"]
    assert trained() == ["standard", "linear"] and linear() == ["linear", "posthoc"]
    assert edited() == ["standard", "linear", "posthoc"]
    checkpoints = [MODES[name].checkpoint for name in edited()]
    assert checkpoints == ["finetuned", "linear_finetuned", "finetuned"]
    prefixes = [MODES[name].accuracies.removesuffix("accuracies") for name in MODES]
    assert prefixes == ["zeroshot_", "ft_", "linear_ft_", "posthoc_ft_"]
    assert MODES["posthoc"].task_vector is NonLinearTaskVector
    assert MODES["linear"].task_vector is LinearizedTaskVector
    assert in_order(["posthoc", "none", "posthoc", "standard"]) == ["none", "standard", "posthoc"]


@pytest.mark.parametrize("twin", [{"name": "linear"}, {"prefix": "linear_"}])
def test_modes_have_distinct_names_and_prefixes(twin: dict[str, str]) -> None:
    facts = dict.fromkeys(("label", "colour", "marker"), "")
    with pytest.raises(ValueError, match="'linear'"):
        register_mode(Mode(**{"name": "other", "prefix": "other_", **facts, **twin}))  # type: ignore[arg-type]
    assert "other" not in MODES


def test_an_unknown_mode_names_the_choices() -> None:
    with pytest.raises(UsageError, match="unknown fine-tuning mode 'liner'; choose from linear"):
        get_mode("liner")
    with pytest.raises(UsageError, match="x needs a fine-tuning mode; choose --finetuning-mode="):
        require_mode(None, "x", edited())
    with pytest.raises(UsageError, match="x has no fine-tuning mode 'none'"):
        require_mode("none", "x", edited())


def test_a_mode_from_outside_is_evaluated_added_and_negated(
    mine: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_suite(monkeypatch):
        words = flags(tmp_path)
        assert finetune.main([*words, "--finetuning-mode=linear"]) == 0
        assert evaluate.main([*words, "--finetuning-mode=none"]) == 0
        for command in (evaluate, add, negate):
            assert command.main([*words, "--finetuning-mode=mine"]) == 0
    folder = tmp_path / "results" / "embedded" / "ViT-Nano-8"
    singles = json.loads((folder / "mine_ft_accuracies.json").read_text())
    assert set(TASKS) <= set(singles)
    added = json.loads((folder / f"mine_additions-{'+'.join(TASKS)}.json").read_text())
    assert set(added["val"]) == {"0.0", "0.5", "1.0"} and 0 <= added["test"]["avg_top1"] <= 1
    negated = json.loads((folder / "mine_negations.json").read_text())
    assert set(TASKS) <= set(negated)
    assert mine.label in (folder / "report.html").read_text()
