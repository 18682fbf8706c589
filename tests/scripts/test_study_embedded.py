from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.eval import eval_single_dataset, evaluate_task_vector
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.run.models import finetuned_encoder, task_vector, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tests.analysis.conftest import smaller_suite, trained
from tests.commands.test_reproduce import script
from tests.small_suite import TASKS, flags, small_config

MODES = ("standard", "linear", "posthoc")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a study of two tasks, and the names of the data sets evaluated on."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(trained(tmp_path_factory.getbasetemp()) / "checkpoints", folder / "checkpoints")
    with smaller_suite(), pytest.MonkeyPatch.context() as monkeypatch:
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
    results: dict[str, Any] = json.loads((root / "study.json").read_text())
    return results


@pytest.mark.parametrize("mode", MODES)
def test_results_agree_with_the_evaluation_scripts(
    mode: str, root: Path, study: dict[str, Any]
) -> None:
    of_mode = study[mode]
    run = Run.of(small_config(root)).with_(
        eval_datasets=[f"{task}Val" for task in TASKS],
        finetuning_accuracies={f"{task}Val": of_mode["single"][task] for task in TASKS},
    )
    encoder, start = zeroshot_encoder(run)
    first, second = (task_vector(run, task, mode, encoder, start) for task in TASKS)
    by_text = evaluate_task_vector(first + second, encoder, run, mode == "posthoc")
    curve = {float(coef): metrics for coef, metrics in by_text.items()}
    best = max(curve, key=lambda c: (curve[c]["avg_normalized_top1"], -c))
    assert of_mode["coefficient"] == best
    for task in TASKS:
        tuned = finetuned_encoder(run, task, mode, encoder, start)
        for key, model in (("single", tuned), ("zeroshot", encoder)):
            top1 = eval_single_dataset(model, f"{task}Val", run)["top1"]
            assert of_mode[key][task] == pytest.approx(top1, abs=1e-6)
        top1 = curve[best][f"{task}Val:top1"]
        assert of_mode["sum of all"][task] == pytest.approx(top1, abs=1e-6)
    # with two tasks the only pair is the sum
    gains = [of_mode["sum of all"][task] - of_mode["zeroshot"][task] for task in TASKS]
    assert of_mode["pairs"] == {"+".join(TASKS): pytest.approx(sum(gains) / 2)}
    for task in TASKS:  # coefficient 0 keeps the control set, so none is worse than zero-shot
        assert of_mode["negation"][task]["target"] <= of_mode["zeroshot"][task]
        assert of_mode["negation"][task]["control"] >= 0.95


def test_the_study_reads_no_test_split(root: Path) -> None:
    names = set((root / "evaluated").read_text().split())
    assert names == {f"{name}Val" for name in (*TASKS, "Shapes")}


@pytest.mark.slow
def test_coefficients_come_from_validation_even_with_test_and_pairs_are_optional(
    root: Path, study: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script("study_embedded").main([*flags(root), "--test", "--no-pairs"]) == 0
    out = capsys.readouterr().out
    assert "pairs" not in out and "| linear, all " in out
    run = Run.of(small_config(root))
    encoder, _ = zeroshot_encoder(run)
    on_test = {task: eval_single_dataset(encoder, task, run)["top1"] for task in TASKS}
    results = json.loads((root / "checkpoints" / "study.json").read_text())
    for mode in MODES:
        assert results[mode]["pairs"] == {}
        assert results[mode]["coefficient"] == study[mode]["coefficient"]
        assert results[mode]["zeroshot"] == pytest.approx(on_test, abs=1e-6)
        for task in TASKS:
            one, other = results[mode]["negation"][task], study[mode]["negation"][task]
            assert one["coefficient"] == other["coefficient"]
    assert results["standard"]["zeroshot"] != study["standard"]["zeroshot"]
