"""A mode registered from outside goes through every command; the table refuses twins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, NonLinearTaskVector
from tangent_arithmetic.commands import add, evaluate, finetune, negate
from tangent_arithmetic.run.modes import (
    COLOURS,
    MODES,
    Mode,
    distinct,
    edited,
    get_mode,
    in_order,
    linear,
    register_mode,
    require_mode,
    trained,
    variant,
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


@pytest.mark.parametrize(
    ("name", "label", "checkpoint"),
    [
        ("linear+taujp", "linear, \u03c4Jp", "linear_taujp_finetuned"),
        ("linear+attention", "linear, attention", "linear_attention_finetuned"),
        (
            "linear+taujp+attention",
            "linear, \u03c4Jp, attention",
            "linear_taujp_attention_finetuned",
        ),
        ("standard+delta", "standard, DELTA", "standard_delta_finetuned"),
    ],
)
def test_composed_modes_are_looked_up_and_stay_out_of_the_table(
    name: str, label: str, checkpoint: str
) -> None:
    mode = MODES[name]
    assert (mode.name, mode.label, mode.checkpoint) == (name, label, checkpoint)
    assert MODES[name] is mode is get_mode(name) and mode.training is mode
    assert mode.linear == name.startswith("linear") and name not in MODES
    assert name not in {*trained(), *edited(), *linear()}
    assert list(MODES) == ["none", "standard", "linear", "posthoc"]


def test_a_composed_mode_has_one_name_and_one_prefix() -> None:
    assert MODES["linear+supervised+attention"] is MODES["linear+attention"]
    assert MODES["linear+supervised"] is MODES["linear"]
    assert variant(MODES["linear"], "taujp") is MODES["linear+taujp"]
    regexes = ["linear+attn.*q", "linear+attn..q", "linear+attn-.q"]
    assert len({MODES[name].prefix for name in regexes}) == 3
    with pytest.raises(UsageError, match="has the prefix 'linear_taujp_attention_' of mode"):
        _ = MODES["linear+taujp+attention"], MODES["linear+taujp_attention"]
    with pytest.raises(UsageError, match="unknown fine-tuning mode 'liner\\+taujp'"):
        get_mode("liner+taujp")
    with pytest.raises(UsageError, match="choose --finetuning-mode=linear"):
        get_mode("standard+taujp")


def test_composed_modes_come_after_the_table_by_name() -> None:
    names = ["standard+delta", "linear+taujp", "posthoc", "linear+tak", "none"]
    expected = ["none", "posthoc", "linear+tak", "linear+taujp", "standard+delta"]
    assert in_order(names) == expected


def test_no_two_modes_of_a_figure_share_colour_and_marker() -> None:
    parts = ["attention", "mlp", "norm", "last:1", "last:2", "lora:4", "attention-weights"]
    names = [f"{base}+{part}" for base in ("linear", "standard") for part in parts]
    names += [f"linear+{of}{part}" for of in ("taujp", "tak") for part in ("", "+norm", "+mlp")]
    modes = distinct(["linear", *names])
    assert [mode.name for mode in modes] == ["linear", *sorted(names)]
    looks = {(mode.colour, mode.marker) for mode in modes}
    assert len(looks) == len(modes) > 2 * len(COLOURS)
    few = distinct(["standard", "linear+taujp", "linear+taujp+norm", "linear+tak", "linear+mlp"])
    assert len({mode.colour for mode in few}) == 5
    assert few[3].colour == MODES["linear+taujp"].colour  # its own, whatever stands beside it
    colours = {mode.colour for mode in MODES.values()}
    assert not colours & set(COLOURS) and palette.CONTROL not in COLOURS


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
