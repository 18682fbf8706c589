from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.artificial_data import experiment, presets, summary
from tangent_arithmetic.artificial_data import finetune as finetuning
from tangent_arithmetic.artificial_data import train as training
from tangent_arithmetic.artificial_data.evaluation import eval_single_dataset
from tangent_arithmetic.artificial_data.experiment import COLUMNS, GRID, TABLES, main
from tangent_arithmetic.artificial_data.presets import Preset
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.encoders.mlp import BackBone
from tangent_arithmetic.run.provenance import ROOT
from tangent_arithmetic.storage.statedict import content_hash
from tangent_arithmetic.storage.states import RunStates
from tests.test_readme import python_blocks
from tests.test_seed_readmes import execute

PNG = b"\x89PNG"


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """Few coefficients, so that the tables take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "GRID", GRID[::4])
        patch.setattr(experiment, "ALPHAS", [0.0, 0.5, 1.0])
        patch.setattr(experiment, "STEPS", [0.0, 0.5, 0.9])
        yield


@pytest.fixture(scope="module")
def root(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of two seeds."""
    folder = tmp_path_factory.mktemp("study")
    assert main([f"--root={folder}", f"--results={folder / 'res'}", "--seeds=2"]) == 0
    return folder


@pytest.fixture
def results(root: Path) -> Path:
    """Its results."""
    return root / "res" / "artificial_data"


def test_everything_is_written_and_finite(results: Path) -> None:
    for table in TABLES:
        content = pd.read_csv(results / f"{table}.csv")
        assert sorted(content["seed"].unique()) == [0, 1]
        assert np.isfinite(content.select_dtypes("number").to_numpy()).all()
        assert content["accuracy"].between(0, 1).all() and not content.isna().any().any()
    for figure in TABLES[1:]:
        assert (results / f"{figure}.png").read_bytes().startswith(PNG)
    facts = json.loads((results / "study.json").read_text())
    assert facts["seeds"] == 2 and facts["settings"]["base"]["epochs"] == 8
    text = (results / "README.md").read_text()
    assert "--preset=default --seeds=2" in text and "| divide, scratch" in text


def test_curves_meet_at_shared_coefficients(results: Path, root: Path) -> None:
    tables = {name: pd.read_csv(results / f"{name}.csv") for name in TABLES}
    own = tables["training"].set_index(["seed", "model", "dataset", "split"])["accuracy"]
    operations, sums = tables["operations"], tables["sums"]
    start = operations[(operations["coefficient"] == 0) & (operations["start"] == "pre-trained")]
    for row in start.itertuples():  # the pre-trained backbone, whatever the operation
        assert row.accuracy == pytest.approx(own[row.seed, "pre-trained", row.dataset, "test"])
    zero = sums[sums["coefficient"] == 0]
    for row in zero.itertuples():
        assert row.accuracy == pytest.approx(own[row.seed, "pre-trained", row.dataset, row.split])
    base = tables["negations"].query("coefficient == 0 and dataset == 'dataset1'")
    for row in base.itertuples():
        assert row.accuracy == pytest.approx(own[row.seed, "base", "dataset1", row.split])
    ends = tables["interpolations"].query("alpha == 1 and dataset == second")
    for row in ends.itertuples():  # one task's own model
        assert row.accuracy == pytest.approx(own[row.seed, row.mode, row.dataset, "test"])
    pairs = {"dataset2+dataset3", "dataset2+dataset4", "dataset3+dataset4"}
    assert set(sums["tasks"]) == {*pairs, "dataset2+dataset3+dataset4"}
    workspace = Workspace(root, seed=1)
    base_path = workspace.backbone()
    two, three, four = (TaskVector(base_path, workspace.backbone(f"dataset{i}")) for i in (2, 3, 4))
    moved = (two + three + four).apply_to(base_path, 0.4)
    expected = eval_single_dataset(moved, "dataset3", workspace=workspace)
    found = sums.query(
        "seed == 1 and mode == 'standard' and coefficient == 0.4 and split == 'test'"
        " and tasks == 'dataset2+dataset3+dataset4' and dataset == 'dataset3'"
    )
    assert found["accuracy"].item() == pytest.approx(expected, abs=1e-5)


def test_an_interrupted_study_continues_and_trains_nothing_twice(
    results: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (results / f"{name}.csv").read_bytes() for name in TABLES}
    workspace = Workspace(root, seed=1)
    workspace.backbone("dataset3", "linear").unlink()
    left = RunStates(workspace.backbone("dataset2", "linear"), {}).folder
    left.mkdir()  # by a run that was killed as it ended
    trained: list[str] = []

    def fit(*args: Any) -> list[float]:
        trained.append(args[5])
        return training.fit(*args)

    monkeypatch.setattr(finetuning, "fit", fit)
    assert main([f"--root={root}", f"--results={root / 'res'}", "--seeds=2"]) == 0
    assert trained == ["linear backbone on dataset3"] and not left.exists()
    assert {name: (results / f"{name}.csv").read_bytes() for name in TABLES} == before


def test_heads_trained_along_are_each_modes_own(
    tiny: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = replace(
        tiny, probe=None, datasets={k: tiny.datasets[k] for k in list(tiny.datasets)[:3]}
    )
    monkeypatch.setitem(presets.PRESETS, "readme", joint)
    words = [f"--root={tmp_path}", "--preset=readme", "--seeds=1", f"--results={tmp_path}"]
    assert main(words) == 0
    workspace = Workspace(tmp_path, "readme")
    study = experiment.Study(workspace)
    heads = [study.head("dataset2", mode) for mode in ("standard", "posthoc", "linear", "scratch")]
    hashes = [content_hash(head.state_dict()) for head in heads]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    rows = pd.read_csv(tmp_path / "artificial_data" / "readme" / "training.csv")
    found = rows.query("model == 'linear' and dataset == 'dataset2' and split == 'test'")
    theta = BackBone.load(workspace.backbone("dataset2", "linear"))
    tau = TaskVector(workspace.backbone(), theta)
    linear = tau.apply_to_linear(workspace.backbone())
    expected = eval_single_dataset(linear, "dataset2", head=heads[2], workspace=workspace)
    assert found["accuracy"].item() == pytest.approx(expected, abs=0.02)
    readme = (tmp_path / "artificial_data" / "readme" / "README.md").read_text()
    assert "each mode has its own" in readme and "3 vectors" not in readme


def test_the_summary_of_known_tables() -> None:
    """Two seeds; the sum is best at 0.5, the negation limited by the control."""
    training, sums, negations = [], [], []
    for seed, task, split in product((0, 1), ("dataset2", "dataset3"), ("val", "test")):
        training.append((seed, "standard", task, split, 0.8, 0.25))
        for coef in GRID:
            gain = 0.2 - (coef - 0.5) ** 2 * 0.8 + 0.1 * seed * (split == "test")
            sums.append((seed, "standard", "dataset2+dataset3", coef, task, split, 0.2 + gain))
            for dataset, value in ((task, 0.5 - 0.4 * coef), ("dataset1", 1 - 0.2 * coef)):
                negations.append((seed, "standard", task, coef, dataset, split, value))
    rows = {"training": training, "sums": sums, "negations": negations}
    tables = {
        name: pd.DataFrame(table, columns=["seed", *COLUMNS[name]]) for name, table in rows.items()
    }
    deviation = f"{100 * np.std([0.4, 0.5], ddof=1):.1f}"
    assert summary.sums(tables) == [
        ["2 vectors, standard", f"25.0 ± {deviation}", f"45.0 ± {deviation}", "56.2 ± 8.8", "0.5"]
    ]
    # the control keeps 95 % up to 0.25: the task falls to 0.5 - 0.4 * 0.25
    assert summary.negations(tables) == [
        ["standard", "50.0 ± 0.0", "40.0 ± 0.0", "100.0 ± 0.0", "95.0 ± 0.0", "0.25"]
    ]


def test_rounding_does_not_decide_between_equal_operations() -> None:
    """Means of the same accuracies, summed in another order or read from a CSV file."""
    rows = [
        (seed, "scratch", "dataset2", "divide", coef, accuracy, 1.0)
        for coef, values in (
            (0.0, (0.1,) * 3),
            (0.3, (0.1, 0.2, 0.3)),
            (0.6, (0.3, 0.2, 0.1000003)),
        )
        for seed, accuracy in enumerate(values)
    ]
    table = pd.DataFrame(rows, columns=["seed", *COLUMNS["operations"]])
    assert summary.operations({"operations": table}) == [
        ["divide, scratch", "10.0 ± 0.0", "20.0 ± 10.0", "0.3", "20.0 ± 10.0", "0.0"]
    ]
    committed = Path(__file__).resolve().parents[2] / "results" / "artificial_data"
    table = pd.read_csv(committed / "operations.csv")
    found = [
        row for row in (committed / "README.md").read_text().splitlines() if "divide, s" in row
    ]
    cells = [cell.strip() for cell in found[0].strip("|").split("|")]
    assert cells == summary.operations({"operations": table})[-1]


def test_rounding_does_not_decide_whether_the_control_is_kept() -> None:
    start, kept = 0.6, 0.95 * 0.6 - 1e-12
    rows = [
        (0, "standard", "dataset2", coef, dataset, split, value)
        for coef, control in ((0.0, start), (0.5, kept), (1.0, 0.0))
        for dataset, value in (("dataset2", 1 - coef), ("dataset1", control))
        for split in ("val", "test")
    ]
    table = pd.DataFrame(rows, columns=["seed", *COLUMNS["negations"]])
    assert summary.negations({"negations": table})[0][-1] == "0.5"


def test_bad_flags(tiny: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds=0", f"--root={tmp_path}"]) == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err
    assert main(["--quick", "--preset=readme", f"--root={tmp_path}"]) == 2
    assert "--quick is --preset=quick, got --preset=readme too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--preset=fast"])
    assert "default" in capsys.readouterr().err


def test_the_public_readmes_code_block(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of the artificial-data README, its imports with the prefix `src.`."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    monkeypatch.chdir(root)
    scope = execute(
        """
        import pandas as pd
        import matplotlib.pyplot as plt
        from tangent_arithmetic.arithmetic.task_vectors import TaskVector
        from src.evaluation import eval_single_dataset

        # Configuration for artificial data experiment
        pretrained_checkpoint = 'artificial_checkpoints/mlp_model.pth'
        finetuned_checkpoint = 'artificial_checkpoints/mlp_model_dataset2.pth'
        dataset = 'dataset2'
        device = 'cpu'

        # Test different task vector operations
        results = []
        for operation in ['subtract', 'add', 'multiply', 'divide']:
            task_vector = TaskVector(
                pretrained_checkpoint=pretrained_checkpoint,
                finetuned_checkpoint=finetuned_checkpoint,
                operation=operation,
            )
            for i in range(10):
                print(f"Iteration {i+1}")
                model_backbone = task_vector.apply_to(pretrained_checkpoint, 0.1*i)
                acc = eval_single_dataset(model_backbone, dataset, device)
                results.append((operation, i, acc))

        # Create DataFrame and visualize results
        results_df = pd.DataFrame(results, columns=['operation', 'iteration', 'accuracy'])

        # Plot results
        plt.figure(figsize=(12, 6))
        for operation in results_df['operation'].unique():
            subset = results_df[results_df['operation'] == operation]
            plt.plot(subset['iteration'], subset['accuracy'], label=operation)
        plt.xlabel('Iteration')
        plt.ylabel('Accuracy')
        plt.title('Task Vector Operations on MLP Model')
        plt.legend()
        plt.grid()
        plt.show()
        """
    )
    frame = scope["results_df"]
    curves = frame.pivot_table(index="iteration", columns="operation", values="accuracy")
    assert curves.shape == (10, 4) and curves.iloc[0].nunique() == 1
    assert curves["subtract"].iloc[-1] > curves["subtract"].iloc[0]
    expected = eval_single_dataset(scope["model_backbone"], "dataset2")
    assert curves["divide"].iloc[-1] == expected


def test_the_readmes_code_block(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "src" / "tangent_arithmetic" / "artificial_data" / "readme.md").read_text(
        encoding="utf-8"
    )
    (block,) = python_blocks(text)
    monkeypatch.chdir(root)
    execute(block)
    *curves, linear = capsys.readouterr().out.splitlines()
    values = [float(line.split()[2]) for line in curves]
    assert len(values) == 40 and values[9] > values[0] == values[10] and 0 < float(linear) < 1


@pytest.mark.slow
def test_the_quick_study_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tangent_arithmetic.artificial_data.experiment", "--quick"]
    words = [f"--root={tmp_path}", f"--results={tmp_path}"]
    subprocess.run([*command, *words], cwd=ROOT, check=True, timeout=300)
    rows = pd.read_csv(tmp_path / "artificial_data" / "quick" / "training.csv")
    means = rows[rows["split"] == "test"].groupby("model")["accuracy"].mean()
    assert means["base"] > 0.5  # guessing: 0.1
    assert means["standard"] > means["pre-trained"] + 0.1 and means["pre-trained"] > 0.2
    assert means["linear"] > means["pre-trained"] + 0.08


@pytest.mark.parametrize("flag", ["--results={}/file/results", "--root={}/file/root"])
def test_what_cannot_be_written_stops_the_study_before_the_work(
    flag: str,
    tiny: Preset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    for module in (training, finetuning):
        monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("trained"))
    argv = [f"--root={tmp_path}/root", f"--results={tmp_path}/results", flag.format(tmp_path)]
    assert main(argv) == 2
    assert "cannot write" in capsys.readouterr().err
