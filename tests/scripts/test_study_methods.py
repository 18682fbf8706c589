"""The study of a method's settings: its figures are those of the evaluation, by another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.run.models import split_of, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tests.commands.test_reproduce import script
from tests.small_suite import TASKS, flags, small_config, small_suite


@pytest.mark.slow
def test_figures_agree_with_an_evaluation_of_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "study.json"
    argv = ["--finetuning-mode=linear+taujp", "--others-batch-size=4", "--grid=penalty=1,100"]
    where = [f"--folder={tmp_path / 'study'}", f"--output={output}", "--test"]
    with small_suite(monkeypatch):
        study = script("study_methods")
        assert study.main([*flags(tmp_path), *argv, *where]) == 0
        rows = json.loads(output.read_text())["rows"]
        assert [row["settings"]["penalty"] for row in rows] == ["1", "100"]
        assert rows[0]["xi"] > rows[1]["xi"] > 0
        folder = next(
            path for path in (tmp_path / "study" / "seed0").iterdir() if "=100" in path.name
        )
        run = Run.of(small_config(tmp_path)).with_(
            finetuning_mode="linear+taujp", save=str(folder), seed=0
        )
        encoder, theta0_hash = zeroshot_encoder(run)
        first, second = (task_vector(run, t, "linear+taujp", encoder, theta0_hash) for t in TASKS)
        base, coef = linearized(encoder), rows[1]["coefficient"]
        for task, tau in zip(TASKS, (first, second), strict=True):
            split, found = split_of(run, base, task), rows[1]["tasks"][task]
            total = (first + second).vector
            expected = split.sweep(base, total, [0.0, coef, 1.0])
            assert [found["zeroshot"], found["best"], found["at 1"]] == pytest.approx(expected)
            assert found["single"] == pytest.approx(split.sweep(base, tau.vector, [1.0])[0])
            negated = split.sweep(base, tau.vector, [-found["negated at"]])[0]
            assert found["target"] == pytest.approx(negated)
        argv = ["--finetuning-mode=standard", "--recipe=fast", "--grid=image-share=1"]
        assert study.main([*flags(tmp_path), *argv, *where]) == 0
        standard = json.loads(output.read_text())["rows"][-1]
        run = run.with_(finetuning_mode="standard", save=str(folder.with_name("image-share=1")))
        for task in TASKS:
            own = task_vector(run, task, "standard", encoder, theta0_hash).vector
            accuracy = split_of(run, encoder, task).sweep(encoder, own, [1.0])[0]
            assert standard["tasks"][task]["single"] == pytest.approx(accuracy)
        assert standard["images"] == rows[0]["images"] > 0 and standard["seconds"] > 0
        assert "xi" not in standard and "target" not in standard
        argv = ["--finetuning-mode=linear", "--joint", "--seeds=0,1"]
        assert study.main([*flags(tmp_path), *argv, *where]) == 0
        joint = json.loads(output.read_text())["rows"][-1]
        assert joint["images"] > 0 and joint["at 1"] > 0 and set(joint["tasks"]) == set(TASKS)
        argv = [*flags(tmp_path), f"--rows={output}", "--rounds=1"]
        assert script("study_fast").main(argv) == 0
    folder = tmp_path / "results" / "embedded"
    cost = json.loads((folder / "fast_cost.json").read_text())["an image"]
    for batch, own in cost["standard"].items():
        ratio = cost["linear"][batch]["operations"] / own["operations"]
        assert ratio == pytest.approx(5 / 3) and own["seconds"] > 0
    assert (folder / "figures" / "fast.svg").is_file()
    table = capsys.readouterr().out
    assert "penalty 100" in table and f"{100 * rows[1]['single']:.1f}" in table
    means = output.with_suffix(".md").read_text()
    assert "penalty 100 (test)" in means and f"{100 * rows[1]['single']:.1f}" in means


def record(seed: int, single: float, **changed: Any) -> dict[str, Any]:
    """A row of the study, with flags that differ from the default."""
    origin = {"provenance": {"config": {"seed": seed, **changed}}}
    settings = {"others": None, "teacher_hash": str(seed)}
    return {"label": "linear", "split": "val", "seed": seed, "settings": settings, **origin} | {
        "single": single
    }


def test_seeds_are_those_of_equal_settings() -> None:
    study = script("study_methods")
    records: list[dict[str, Any]] = []
    for one in (record(0, 0.1), record(0, 0.5), record(1, 0.7), record(0, 0.9, lr=1e-3)):
        records = study.added(records, one)
    assert [one["single"] for one in records] == [0.5, 0.7, 0.9]  # a repeated one is replaced
    lines = [line.split("|")[1:4] for line in study.over_seeds(records).splitlines()[2:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["linear (val)", "2", "60.0 ± 14.1"],
        ["linear (val), lr 0.001", "1", "90.0"],
    ]


@pytest.mark.parametrize("name", ["embedded/methods", "embedded/fast", "text/fast"])
def test_the_committed_table_is_that_of_its_rows(name: str) -> None:
    path = Path(__file__).resolve().parents[2] / "results" / f"{name}.json"
    table = script("study_methods").over_seeds(json.loads(path.read_text())["rows"])
    assert table == path.with_suffix(".md").read_text(encoding="utf-8").strip()
    assert "interference" in table and "| xi " not in table  # which is the disentanglement error


def test_the_loss_of_joint_training_sees_the_classes_of_the_images_own_task() -> None:
    masked = script("study_methods").Masked([0, 3, 5])
    logits = torch.randn(4, 5, dtype=torch.float64)
    found = masked.loss(nn.Identity(), (logits, torch.tensor([0, 2, 3, 4])), 0)
    first = F.cross_entropy(logits[:2, :3], torch.tensor([0, 2]), reduction="none")
    second = F.cross_entropy(logits[2:, 3:], torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(found, torch.cat([first, second]))


def test_a_student_begins_with_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "study.json"
    with small_suite(monkeypatch):
        study = script("study_methods")
        own = [*flags(tmp_path), "--finetuning-mode=linear", f"--folder={tmp_path / 'linear'}"]
        assert study.main(own) == 0
        start = str(next((tmp_path / "linear" / "seed0").iterdir())).replace("seed0", "seed{seed}")
        mode = ["--finetuning-mode=standard+delta", f"--folder={tmp_path / 'delta'}"]
        argv = [*flags(tmp_path), *mode, f"--start={start}", f"--output={output}"]
        assert study.main([*argv, "--grid=penalty=1"]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["settings"]["teacher"] == "linear" and row["split"] == "val"
