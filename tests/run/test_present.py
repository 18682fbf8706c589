"""Modes are found by the files of a run: those of the table by name, composed ones by content."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.present import chosen, files_of, kind_of, with_checkpoints, with_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.checkpoints import save_tensors

REGEX = "linear+attn.*weight"


def put(folder: Path, stem: str, **origin: Any) -> Path:
    """A file of results with this provenance."""
    path = folder / f"{stem}.json"
    path.write_text(json.dumps({"provenance": origin} if origin else {}))
    return path


@pytest.mark.parametrize(
    ("stem", "origin", "expected"),
    [
        ("zeroshot_accuracies", {}, ("none", "single")),
        ("ft_accuracies", {}, ("standard", "single")),
        ("linear_additions", {}, ("linear", "addition")),
        ("additions-A+B", {}, ("standard", "addition A+B")),
        ("posthoc_negations", {}, ("posthoc", "negation")),
        ("linear_taujp_ft_accuracies", {"mode": "linear+taujp"}, ("linear+taujp", "single")),
        (
            "linear_taujp_additions-A+B",
            {"config": {"finetuning_mode": "linear", "objective": "taujp", "trainable": "all"}},
            ("linear+taujp", "addition A+B"),
        ),
        (
            "linear_attention-weights_negations",
            {"config": {"finetuning_mode": "linear+attention-weights"}},
            ("linear+attention-weights", "negation"),
        ),
        (f"{MODES[REGEX].prefix}additions", {"mode": REGEX}, (REGEX, "addition")),
        ("linear_taujp_additions", {}, None),  # nothing says which mode
        ("linear_taujp_additions", {"mode": "linear+tak"}, None),  # another mode's name
        ("linear_taujp_additions", {"mode": "mine"}, None),  # registered elsewhere
        ("negations-A", {}, None),
        ("summary", {"mode": "linear"}, None),
    ],
)
def test_the_mode_and_method_of_a_file(
    stem: str, origin: dict[str, Any], expected: tuple[str, str] | None, tmp_path: Path
) -> None:
    found = kind_of(put(tmp_path, stem, **origin))
    assert (found and (found[0].name, found[1])) == expected


def test_modes_with_results_are_in_order(tmp_path: Path) -> None:
    put(tmp_path, "linear_taujp_ft_accuracies", mode="linear+taujp")
    put(tmp_path, "linear_tak_additions", mode="linear+tak")
    put(tmp_path, "posthoc_negations")
    put(tmp_path, "additions")
    put(tmp_path, "other")
    assert with_results(tmp_path) == ["standard", "posthoc", "linear+tak", "linear+taujp"]
    put(tmp_path, "linear_taujp_additions-A+B")
    put(tmp_path, "linear_taujp_additions")
    paths = files_of(tmp_path, "linear+taujp", "addition")
    assert [(path.stem, of) for path, of in paths] == [
        ("linear_taujp_additions-A+B", "A+B"),
        ("linear_taujp_additions", ""),
    ]
    assert [path.stem for path, _ in files_of(tmp_path, "standard", "addition")] == ["additions"]


def finetuned(run: Run, task: str, mode: str) -> None:
    """A checkpoint of a task in a mode."""
    path = run.finetuned_path(task, mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    theta = {"weight": torch.ones(2)}
    save_tensors(path, theta, kind="other", info={"mode": mode})


def test_modes_with_checkpoints_of_every_task(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.of(Config(save=str(tmp_path), tasks=["MNIST", "Signs"]))
    assert list(chosen(run)) == ["standard", "linear", "posthoc"]  # their errors name the way out
    for task in run.tasks:
        for mode in ("linear", REGEX):
            finetuned(run, task, mode)
    finetuned(run, "MNIST", "linear+taujp")
    (tmp_path / "MNISTVal" / "broken_finetuned.safetensors").write_bytes(b"x")
    found, missing = with_checkpoints(run)
    assert found == ["linear", REGEX]
    assert missing == {"standard": "MNIST", "posthoc": "MNIST", "linear+taujp": "Signs"}
    with caplog.at_level(logging.INFO):
        assert list(chosen(run)) == found
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert line.endswith("linear+taujp (no checkpoint of Signs)") and "posthoc" in line
    assert list(chosen(run.with_(finetuning_mode="linear", objective="tak"))) == ["linear+tak"]
