"""The command combine, on a small run: what it reports is what the model that it writes does."""

from __future__ import annotations

import pytest

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.commands import combine
from tangent_arithmetic.run.models import load_encoder, split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.storage.reading import read_json
from tests.analysis.conftest import own, run, words
from tests.small_suite import TASKS

__all__ = ["own", "run", "words"]


@pytest.mark.parametrize(("mode", "which"), [("linear", "task"), ("linear", "task-layer")])
def test_reported_accuracies_are_those_of_the_merged_model(
    own: Run, words: list[str], mode: str, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--finetuning-mode={mode}", f"--coefficients={which}", *words]
    assert combine.main(argv) == 0
    out = capsys.readouterr().out
    (path,) = own.results.glob(
        f"{own.with_(finetuning_mode=mode).mode.prefix}combined_{which}.json"
    )
    results = read_json(path)
    test, edits = results["test"], Edits(own, mode, TASKS)
    coefficients = results["coefficients"]
    assert (
        len(coefficients) == len(TASKS) if which == "task" else len(coefficients) > 2 * len(TASKS)
    )
    uniform = dict.fromkeys(TASKS, results["uniform"])
    prefix = own.with_(finetuning_mode=mode).mode.prefix
    checkpoint = own.folder / f"{prefix}combined_{which}.safetensors"
    encoder = load_encoder(checkpoint, linear=mode == "linear")
    for task in TASKS:
        assert test["zeroshot"][task] == pytest.approx(edits.accuracies(task, [{}])[0])
        assert test["uniform"][task] == pytest.approx(edits.accuracies(task, [uniform])[0])
        found = split_of(own, encoder, task).accuracy(encoder)["top1"]
        assert test["solved"][task] == pytest.approx(found)
    assert f"{results['uniform']:g}" in out and str(path) in out
    before = path.read_text()
    assert combine.main(argv) == 0  # the same result on a rerun
    again = read_json(path)
    assert again["coefficients"] == coefficients and again["test"] == test and before


def test_an_unknown_grouping_is_refused(
    own: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--finetuning-mode=linear", "--coefficients=(", *words]
    assert combine.main(argv) == 2
    assert "--coefficients" in capsys.readouterr().err


def test_standard_models_are_refused(
    own: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert combine.main(["--finetuning-mode=standard", *words]) == 2
    assert "combine solves for linear models" in capsys.readouterr().err
