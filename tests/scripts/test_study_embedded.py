from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.eval import eval_single_dataset, evaluate_task_vector
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.run.models import finetuned_encoder, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tests.commands.test_reproduce import script
from tests.small_suite import TASKS, flags, small_config, small_suite


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a study of two tasks, and the names of the data sets evaluated on."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        evaluated: list[str] = []
        passes = EvalBatches.__iter__

        def watched(self: EvalBatches) -> Any:
            evaluated.append(self.name)
            return passes(self)

        monkeypatch.setattr(EvalBatches, "__iter__", watched)
        argv = [*flags(folder), f"--output={folder / 'study.json'}"]
        assert script("study_embedded").main(argv) == 0
        (folder / "evaluated").write_text("\n".join(evaluated))
        yield folder


@pytest.fixture(scope="module")
def study(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "study.json").read_text())
    return found


@pytest.mark.parametrize("mode", ["standard", "linear", "posthoc"])
def test_figures_are_those_of_the_evaluation_scripts(
    mode: str, root: Path, study: dict[str, Any]
) -> None:
    args, found = small_config(root), study[mode]
    encoder, start = zeroshot_encoder(Run.of(args))
    vectors = {task: task_vector(Run.of(args), task, mode, encoder, start) for task in TASKS}
    args.eval_datasets = [f"{task}Val" for task in TASKS]
    args.finetuning_accuracies = {f"{task}Val": found["single"][task] for task in TASKS}
    total = sum(list(vectors.values())[1:], start=vectors[TASKS[0]])
    args.n_eval_points = 3
    found_curve = evaluate_task_vector(total, encoder, args, mode == "posthoc")
    curve = {float(coef): metrics for coef, metrics in found_curve.items()}
    best = max(curve, key=lambda c: (curve[c]["avg_normalized_top1"], -c))
    assert found["coefficient"] == best
    for task in TASKS:
        one = finetuned_encoder(Run.of(args), task, mode, encoder, start)
        top1 = eval_single_dataset(one, f"{task}Val", args)["top1"]
        assert found["single"][task] == pytest.approx(top1, abs=1e-6)
        top1 = eval_single_dataset(encoder, f"{task}Val", args)["top1"]
        assert found["zeroshot"][task] == pytest.approx(top1, abs=1e-6)
        assert found["sum of all"][task] == pytest.approx(curve[best][f"{task}Val:top1"], abs=1e-6)


@pytest.mark.parametrize("mode", ["standard", "linear", "posthoc"])
def test_of_two_tasks_the_only_pair_is_the_sum(mode: str, study: dict[str, Any]) -> None:
    found = study[mode]
    assert set(found["pairs"]) == {"+".join(p) for p in itertools.combinations(TASKS, 2)}
    gains = [found["sum of all"][task] - found["zeroshot"][task] for task in TASKS]
    assert found["pairs"]["+".join(TASKS)] == pytest.approx(sum(gains) / 2)
    for task in TASKS:  # coefficient 0 keeps the control set, so none is worse than zero-shot
        assert found["negation"][task]["target"] <= found["zeroshot"][task]
        assert found["negation"][task]["control"] >= 0.95


def test_the_study_reads_no_test_split(root: Path) -> None:
    names = set((root / "evaluated").read_text().split())
    assert names == {f"{name}Val" for name in (*TASKS, "Shapes")}


def test_on_test_the_coefficients_are_still_those_of_validation(
    root: Path, study: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        argv = [*flags(root), "--test", f"--output={root / 'test.json'}"]
        assert script("study_embedded").main(argv) == 0
        args = small_config(root)
        encoder, _ = zeroshot_encoder(Run.of(args))
        on_test = {task: eval_single_dataset(encoder, task, args)["top1"] for task in TASKS}
    found = json.loads((root / "test.json").read_text())
    for mode in ("standard", "linear", "posthoc"):
        assert found[mode]["coefficient"] == study[mode]["coefficient"]
        for task in TASKS:
            one, other = found[mode]["negation"][task], study[mode]["negation"][task]
            assert one["coefficient"] == other["coefficient"]
            assert found[mode]["zeroshot"][task] == pytest.approx(on_test[task], abs=1e-6)
    assert found["standard"]["zeroshot"] != study["standard"]["zeroshot"]


def test_without_pairs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        assert script("study_embedded").main([*flags(root), "--no-pairs"]) == 0
    out = capsys.readouterr().out
    assert "pairs" not in out and "| linear, all " in out
    assert json.loads((root / "checkpoints" / "study.json").read_text())["linear"]["pairs"] == {}
