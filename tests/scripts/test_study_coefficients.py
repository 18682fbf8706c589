"""The study of solved coefficients, on a small run: its rows are what an evaluation gives."""

from __future__ import annotations

import pytest

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.reading import read_json
from tests.analysis.conftest import own, run, words
from tests.commands.test_reproduce import script
from tests.small_suite import TASKS

__all__ = ["own", "run", "words"]


@pytest.mark.slow
def test_rows_are_what_an_evaluation_gives(
    own: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    study = script("study_coefficients")
    argv = [*words, "--modes=linear,standard", "--few=2", "--rates=0.01", "--blocks"]
    assert study.main(argv) == 0
    table, folder = capsys.readouterr().out, own.results.parent
    results = read_json(folder / "coefficients.json")["seeds"]["0"]
    for mode in ("linear", "standard"):
        rows, edits = results[mode]["rows"], Edits(own, mode, TASKS)
        for name in ("zero-shot", "uniform", "task", "uniform, 2 shots"):
            a = {key.split("/")[0]: value for key, value in rows[name]["coefficients"].items()}
            for task in TASKS:
                expected = edits.accuracies(task, [a])[0]
                assert rows[name]["test"][task] == pytest.approx(expected), (mode, name)
        for name in ("layer", "task-layer", "task-layer, 2 shots", "aTLAS, rate 0.01"):
            assert rows[name]["seconds"] > 0 and f"{100 * rows[name]['mean']:.1f}" in table
        facts = results[mode]["provenance"]
        assert facts["mode"] == mode and set(facts["checkpoints"]) == set(TASKS)
    linear, standard = results["linear"]["rows"], results["standard"]["rows"]
    assert len(standard["block"]["coefficients"]) > 4 * len(linear["task-layer"]["coefficients"])
    one, layer = linear["negation, one"], linear["negation, layer"]
    assert one["control"] > 0 and set(layer["test"]) == set(TASKS)
    assert table.strip() in (folder / "coefficients.md").read_text(encoding="utf-8")
    before = (folder / "coefficients.json").read_bytes()
    assert study.main([*argv, "--sample=9"]) == 2
    said = "has rows of all pictures, got --sample=9; delete it, or name another folder"
    assert said in capsys.readouterr().err
    assert (folder / "coefficients.json").read_bytes() == before


def test_means_and_deviations_over_seeds() -> None:
    study = script("study_coefficients")
    row = {"seconds": 2.0, "mean": 0.5}
    seeds = {"0": {"linear": {"task": row}}, "1": {"linear": {"task": {**row, "mean": 0.7}}}}
    assert "60.0 ± 14.1" in study.table(seeds) and "2.0" in study.table(seeds)


def test_the_time_of_a_solve(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--pictures=60", "--coefficients=5", "--features=8", "--classes=3"]
    assert script("benchmark_solving").main(sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ridge 0.1", "cross-validated ridge"]


def test_a_rate_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script("study_coefficients").main(["--rates=0.01,x"])
    assert "argument --rates: expected a number, got 'x'" in capsys.readouterr().err
