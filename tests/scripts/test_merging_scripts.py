"""Scripts around merging: the benchmark's files, the study's table."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.commands.test_reproduce import script


def test_the_benchmark_s_files_are_those_of_a_clip() -> None:
    benchmark = script("benchmark_merging")
    config = {key: value for key, value in benchmark.CONFIG.items() if key != "architectures"}
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**config))
    expected = {
        f"vision_model.{name.removeprefix('vision_model.')}": tuple(value.shape)
        for name, value in model.named_parameters()
    }
    assert benchmark.shapes() == expected


def test_the_study_s_table_has_mean_and_deviation() -> None:
    study = script("study_merging")
    row = {
        "top1": {"A": 0.5, "B": 0.7},
        "own": {"A": 1.0, "B": 0.7},
        "seconds": 0.1,
        "peak_bytes": 3 * 2**20,
    }
    other = {**row, "top1": {"A": 0.7, "B": 0.7}, "seconds": 0.3, "coefficient": 0.2}
    (line,) = study.summarize({0: {"ties": {**row, "coefficient": 0.1}}, 1: {"ties": other}})
    assert line == ["ties", "65.0 ± 7.1", "80.0 ± 7.1", "0.1, 0.2", "0.20", "3"]


def test_added_methods_take_their_place_among_the_earlier_rows() -> None:
    study = script("study_merging")
    earlier = {"zero-shot": {"top1": 0}, "star": {"top1": 1}, "della": {"top1": 2}}
    rows = study.in_order(earlier, {"zero-shot": {"top1": 3}, "karcher": {"top1": 4}})
    assert list(rows) == ["zero-shot", "della", "karcher", "star"]
    assert rows["zero-shot"] == {"top1": 3}


@pytest.mark.parametrize("flag", ["--methods=star", "--costs"])
def test_rows_of_other_seeds_and_modes_are_kept(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = script("study_merging")
    row = {"top1": {"A": 0.5}, "own": {"A": 1.0}, "seconds": 9.0, "options": {}}
    rows = {"zero-shot": row, "star": row, "della": row}
    seeds = {0: {"standard": rows, "linear": rows}, 1: {"standard": rows}, 2: {"linear": rows}}
    study.write(tmp_path / "embedded" / "merging", seeds, 1.0)
    monkeypatch.setattr(study, "runs", lambda *_: iter([(0, tmp_path), (1, tmp_path)]))
    again = {"star": {**row, "seconds": 1.0}}
    monkeypatch.setattr(study, "study", lambda *_: again)
    monkeypatch.setattr(study, "costs", lambda *_: again)
    assert study.main([flag, f"--results={tmp_path}"]) == 0
    found = json.loads((tmp_path / "embedded" / "merging.json").read_text())["seeds"]
    expected = {str(s): {m: dict(one) for m, one in own.items()} for s, own in seeds.items()}
    for seed in "01":
        expected[seed]["standard"] |= again
    assert found == expected
    lines = (tmp_path / "embedded" / "merging.md").read_text()
    assert lines.count("| star ") == lines.count("| della ") == 2


def test_the_study_has_all_methods() -> None:
    from tangent_arithmetic.merging import METHODS

    study = script("study_merging")
    known = {
        name
        for name, method in METHODS.items()
        if method.function.__module__.startswith("tangent_arithmetic.") and name != "dummy"
    }
    assert {name for name, *_ in study.METHODS.values()} == known


def test_the_study_of_compressions_has_all_of_them_and_counts_bits() -> None:
    from tangent_arithmetic.merging.compressions import COMPRESSIONS

    script("study_merging")
    study = script("study_compressions")
    assert {name for name, _ in study.COMPRESSIONS.values()} == set(COMPRESSIONS)
    row = {"top1": {"A": 0.5, "B": 0.7}, "own": {"A": 1.0, "B": 0.7}, "weights": 100}
    row |= {"bits": {"A": 100, "B": 300}, "shared_bits": 3200}
    (line,) = study.summarize({0: {"emr": row}})
    assert line == ["emr", "60.0", "75.0", "2.00", "32.00", "18.00"]


def test_each_task_s_lambda_is_the_best_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    script("study_merging")
    study = script("study_compressions")
    best = {"A": 0.5, "B": 0.3}

    def accuracy(_pool: object, _tasks: object, task: str, value: float, validation: bool) -> float:
        assert validation
        return 0.9 if best[task] <= value < 0.6 else 0.1

    monkeypatch.setattr(study, "accuracy", accuracy)

    def made(_pool: object, name: str, tall_mask_lambda: float) -> SimpleNamespace:
        assert name == "tall_masks"
        return SimpleNamespace(reconstruct=lambda _task: tall_mask_lambda)

    monkeypatch.setattr(study, "Compressed", made)
    assert {task: study.chosen_lambda(None, None, task) for task in best} == best
