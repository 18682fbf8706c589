"""The command combine, on a small run: what it reports is what the model that it writes does."""

from __future__ import annotations

import copy

import pytest

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.commands import combine
from tangent_arithmetic.report.solved import solved_of
from tangent_arithmetic.run.models import load_encoder, split_of
from tangent_arithmetic.run.negation import zeroshot_accuracies
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.reading import read_json
from tests.analysis.conftest import own, run, words
from tests.small_suite import TASKS

__all__ = ["own", "run", "words"]

SOME = f"tasks{'+'.join(TASKS)}"  # in names of files: the suite has more


@pytest.mark.parametrize(
    ("mode", "which", "more"),
    [
        ("linear", "task", []),
        ("linear", "task-layer", []),
        ("posthoc", "layer", ["--ridge=0.1"]),
        ("standard", "task", ["--ridge=0.1", "--solver=gauss-newton"]),
        ("standard", "layer", []),
        ("standard", "task-layer", ["--solver=quasi-newton"]),
    ],
)
def test_reported_accuracies_are_those_of_the_merged_model(
    own: Run,
    words: list[str],
    mode: str,
    which: str,
    more: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [f"--finetuning-mode={mode}", f"--coefficients={which}", *more, *words]
    assert combine.main(argv) == 0
    out, here = capsys.readouterr().out, own.with_(finetuning_mode=mode)
    name = "_".join([which, *(flag.strip("-").replace("=", "") for flag in more), SOME])
    path = own.results / f"{here.mode.prefix}combined_{name}.json"
    results = read_json(path)
    test, edits = results["test"], Edits(own, mode, TASKS)
    coefficients = results["coefficients"]
    layers = {name.rpartition("/")[2] for name in coefficients}
    counts = {"task": len(TASKS), "layer": len(layers), "task-layer": len(TASKS) * len(layers)}
    assert len(coefficients) == counts[which] and (which == "task" or len(layers) > 3)
    assert len(set(coefficients.values())) > 1  # not the uniform coefficient
    uniform = dict.fromkeys(TASKS, results["uniform"])
    checkpoint = own.folder / f"{here.mode.prefix}combined_{name}.safetensors"
    encoder = load_encoder(checkpoint, linear=here.mode.linear)
    for task in TASKS:
        assert test["zeroshot"][task] == pytest.approx(edits.accuracies(task, [{}])[0])
        assert test["uniform"][task] == pytest.approx(edits.accuracies(task, [uniform])[0])
        found = split_of(own, encoder, task).accuracy(encoder)["top1"]
        assert test["solved"][task] == pytest.approx(found)
    assert f"{results['uniform']:g}" in out and str(path) in out and str(checkpoint) in out
    solver = "gauss-newton" if "--solver=gauss-newton" in more else "quasi-newton"
    assert results["solver"].get("solver") == (None if here.mode.linear else solver)
    assert combine.main(argv) == 0  # the same result on a rerun
    again = read_json(path)
    assert again["coefficients"] == coefficients and again["test"] == test


@pytest.mark.parametrize("mode", ["linear", "standard"])
def test_coefficients_of_few_or_unlabelled_images(own: Run, words: list[str], mode: str) -> None:
    prefix = own.with_(finetuning_mode=mode).mode.prefix
    for flag, name in (("--shots=1", "task_1shot"), ("--unlabelled=selflabel", "task_selflabel")):
        argv = [f"--finetuning-mode={mode}", "--coefficients=task", flag, *words]
        assert combine.main(argv) == 0
        results = read_json(own.results / f"{prefix}combined_{name}_{SOME}.json")
        assert results["solved_on"]["labels"] == (flag == "--shots=1")
        assert set(results["test"]["solved"]) == set(TASKS)
        few = results["solved_on"]["images"]["EmojiVal"]
        assert few < 20 if flag == "--shots=1" else few == 20


def test_negation_by_layer_keeps_the_control_set(
    own: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--finetuning-mode=linear", "--coefficients=layer", "--negate", *words]
    assert combine.main(argv) == 0
    path = own.results / "linear_negated_layer.json"
    results, out = read_json(path), capsys.readouterr().out
    for task in TASKS:
        val = results[task]["val"]
        assert val["solved"]["control"] >= results[task]["least_control"]
        assert val["solved"]["task"] <= val["uniform"]["task"]
        assert set(results[task]["test"]["solved"]) == {task, own.control}
        fronts = [point["task"] for point in results[task]["front"]]
        assert fronts == sorted(fronts, reverse=True)
    assert "solved control" in out and str(path) in out
    assert combine.main([*argv, f"--tasks={TASKS[0]}"]) == 0
    again = read_json(path)
    assert set(again) == set(results)  # the other task is kept
    assert again["provenance"]["control"] == {"name": own.control, "threshold": 0.95}


def test_other_flags_have_files_of_their_own(own: Run, words: list[str]) -> None:
    argv, folder = ["--finetuning-mode=linear", "--coefficients=task", *words], own.results
    before = set(folder.glob("linear_combined_task*"))
    for more, name in (
        (["--ridge=10"], f"ridge10_{SOME}"),
        (["--coefficient-bounds=0,1"], f"bounds0,1_{SOME}"),
        ([f"--tasks={TASKS[1]}"], f"tasks{TASKS[1]}"),
    ):
        assert combine.main([*argv, *more]) == 0
        path = folder / f"linear_combined_task_{name}.json"
        assert read_json(path)["checkpoint"].endswith(f"_{name}.safetensors")
    assert len(set(folder.glob("linear_combined_task*")) - before) == 3
    names = {one.name for one in solved_of(folder)}
    assert {"task, ridge 10", "task, bounds 0,1", "task"} <= names


def test_accuracies_of_other_heads_or_examples_are_refused(own: Run, words: list[str]) -> None:
    path = own.results / "zeroshot_accuracies.json"
    results = read_json(path)
    theta0_hash = results["provenance"]["theta0_hash"]
    assert zeroshot_accuracies(own, theta0_hash)
    for kind, message in (("heads", f"other heads of {TASKS[0]}"), ("splits", "other splits")):
        changed = copy.deepcopy(results)
        changed["provenance"][kind][TASKS[0]] = "0" * 64
        write_json(path, changed)
        with pytest.raises(UsageError, match=message):
            zeroshot_accuracies(own, theta0_hash)
    write_json(path, results)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--finetuning-mode=linear", "--coefficients=("], "--coefficients"),
        (["--finetuning-mode=standard", "--negate"], "--negate solves for coefficients of linear"),
        (["--finetuning-mode=linear", "--solver=gauss-newton"], "--solver is for standard models"),
        (["--finetuning-mode=linear", "--unlabelled=entropy", "--negate"], "uses no labels"),
        (["--finetuning-mode=linear", "--coefficient-bounds=1,0"], "--coefficient-bounds"),
        (
            ["--finetuning-mode=linear", "--negate", "--coefficient-bounds=0,1"],
            "coefficients below",
        ),
        (["--finetuning-mode=linear", "--shots=1,2"], "--shots: expected one number"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    own: Run, words: list[str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert combine.main([*flags, *words]) == 2
    assert message in capsys.readouterr().err
