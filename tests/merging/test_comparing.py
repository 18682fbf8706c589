"""Results of merges beside published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tangent_arithmetic.commands import merge
from tangent_arithmetic.merging import METHODS
from tangent_arithmetic.merging.comparing import comparison, measured, published
from tangent_arithmetic.runtime.errors import UsageError

TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


def report(path: Path, owner: str = "tanganke", method: str = "task_arithmetic") -> Path:
    """A report of eight tasks, as `merge` writes it."""
    names = {"_pretrained_": "openai/clip-vit-base-patch32"}
    names |= {task: f"{owner}/clip-vit-base-patch32_{task}" for task in TASKS}
    content: dict[str, Any] = {task: {"accuracy": 0.69, "loss": 1.0} for task in TASKS}
    content["average"] = {"accuracy": 0.69, "loss": 1.0}
    models = {name: {"place": place, "fingerprint": "0"} for name, place in names.items()}
    options = {"scaling_factor": 0.3} if "scaling_factor" in METHODS[method].defaults else {}
    content["merge"] = {"method": method, "options": options, "models": models}
    path.write_text(json.dumps(content))
    return path


def cells(text: str, checkpoints: str) -> dict[str, str]:
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")
    )
    own = [dict(zip(header, row, strict=True)) for row in rows]
    (row,) = [each for each in own if each["their checkpoints"] == checkpoints]
    return row


def test_a_report_stands_beside_what_is_published(tmp_path: Path) -> None:
    found = measured(report(tmp_path / "report.json"))
    assert (found.model, found.tasks, found.checkpoints) == ("ViT-B-32", 8, "FusionBench")
    text = comparison([found])
    own = cells(text, "FusionBench")
    assert (own["ours, %"], own["published, %"], own["deviation"]) == ("69.0", "68", "+1.0")
    assert own["differs (ours)"] == "nothing known"
    other = cells(text, "TALL")
    assert other["deviation"] == "-1.8"
    assert other["differs (ours)"] == "checkpoints (FusionBench), coefficient (0.3)"
    assert text.index("68") < text.index("70.8")  # the same checkpoints first


def test_chosen_coefficients_compare_with_those_chosen(tmp_path: Path) -> None:
    path = report(tmp_path / "report.json", owner="someone")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "scaling_factor": {"coefficient": 0.3}}))
    found = measured(path, checkpoints="TALL")
    assert found.coefficient == "0.3 on validation"
    assert cells(comparison([found]), "TALL")["differs (ours)"] == "nothing known"
    assert measured(path).checkpoints == "not stated"


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = report(tmp_path / "report.json", method="ties")
    content = json.loads(path.read_text())
    recipe = content["merge"]
    recipe["options"] |= {"threshold": 50}
    recipe["plugins"] = [{"normalise": {}}, {"lines": {"beta": 0.5}}]
    del recipe["models"]["dtd"]
    path.write_text(json.dumps(content))
    differs = cells(comparison([measured(path)]), "FusionBench")["differs (ours)"]
    assert "models (7), plug-ins (normalise, lines), options (threshold=50)" in differs


def test_results_of_a_run_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "merging-x.json"
    test = {"MNIST:top1": 0.5, "DTD:top1": 0.7, "MNIST:normalized_top1": 0.6, "avg_top1": 0.6}
    recipe = {"method": "tsv_m", "options": {"alpha": 1.0}, "models": {"MNIST": {"place": "x"}}}
    content = {"test": test, "merge": recipe, "provenance": {"model": "ViT-Nano-8"}}
    path.write_text(json.dumps(content))
    found = measured(path)
    assert (found.accuracy, found.tasks, found.model) == (60.0, 2, "ViT-Nano-8")
    assert "nothing published is known" in comparison([found])


def test_published_results_are_of_known_methods() -> None:
    rows = published()
    assert {row.method for row in rows} <= {*METHODS, "pretrained"}
    assert {row.tasks for row in rows} == {8, 14, 20}
    assert all(20 < row.accuracy < 100 and row.source for row in rows)
    keys = [(row.method, row.model, row.tasks, row.checkpoints) for row in rows]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("content", [{}, {"merge": {"method": "ties"}}, {"average": {}}])
def test_other_files_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is no report of an evaluated merge"):
        measured(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = report(tmp_path / "report.json")
    assert merge.main(["compare", str(path)]) == 0
    assert "FusionBench, docs/modelpool/clip_vit.md" in capsys.readouterr().out
    content = json.loads(path.read_text())
    content["merge"]["models"] = {"a": {"place": "a.safetensors"}}
    path.write_text(json.dumps(content))
    assert merge.main(["compare", str(path)]) == 2
    assert "does not tell the model; name it with --model" in capsys.readouterr().err
    assert merge.main(["compare", str(path), "--model=ViT-B-32"]) == 0
