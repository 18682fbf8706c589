from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import make_classification

from tangent_arithmetic.artificial_data import generate as generation
from tangent_arithmetic.artificial_data.generate import generate, write_dataset
from tangent_arithmetic.artificial_data.presets import DatasetSpec, Preset
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

SPEC = DatasetSpec(n_samples=500, n_features=9, n_classes=3, n_informative=4, random_state=5)


def test_the_rows_are_those_of_make_classification() -> None:
    train, test = generate(SPEC)
    assert list(train.columns) == [*map(str, range(9)), "target"]
    assert (len(train), len(test)) == (400, 100)
    x, y = make_classification(
        n_samples=500, n_features=9, n_classes=3, n_informative=4, random_state=5
    )
    expected = {(*row, target) for row, target in zip(x, y, strict=True)}
    found = {tuple(row) for row in pd.concat([train, test]).to_numpy()}
    assert found == expected
    shares = [table["target"].value_counts(normalize=True).sort_index() for table in (train, test)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01


def test_informative_columns_come_first_without_shuffling() -> None:
    train, _ = generate(replace(SPEC, n_samples=4000, shuffle=False, class_sep=3.0, n_redundant=0))
    means = train.groupby("target").mean()
    gaps = (means.max() - means.min()).to_numpy()
    assert gaps[:4].max() > 1.0 and gaps[4:].max() < 0.3


def test_files_are_kept_and_other_numbers_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert write_dataset(workspace, "d", SPEC)
    before = workspace.csv("d", "train").read_bytes()
    assert not write_dataset(workspace, "d", SPEC)
    with pytest.raises(UsageError, match="was made with other settings"):
        write_dataset(workspace, "d", replace(SPEC, n_classes=2))
    assert workspace.csv("d", "train").read_bytes() == before


def test_numbers_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match=r"no data set can be made of .*n_informative"):
        generate(replace(SPEC, n_classes=100))


def test_splits_are_stratified_and_apart(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_dataset(workspace, "d", SPEC)
    parts = {split: workspace.data("d", split) for split in ("train", "val", "test")}
    assert [len(y) for _, y in parts.values()] == [360, 40, 100]
    rows = {split: {tuple(row) for row in x.tolist()} for split, (x, _) in parts.items()}
    assert not rows["train"] & rows["val"] and not rows["train"] & rows["test"]
    for x, y in parts.values():
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert (torch.bincount(y) / len(y) - 1 / 3).abs().max() < 0.05
    with pytest.raises(UsageError, match="unknown split 'tset'; choose from test"):
        workspace.data("d", "tset")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r'expected rows of the columns "0", "1", ... and "target"'),
        ("0,target\n", "got 0 rows"),
        ("0,target\n1.5,0\nnan,1\n", "row 2: expected finite numbers"),
        ("0,target\n1.5,0\nx,1\n", "row 2: expected finite numbers"),
        ("0,target\n1.5,0\n1.0,0.5\n", "row 2: expected finite numbers and a class"),
        ("0,target\n1.5,-1\n", "row 1: expected finite numbers and a class"),
        ("", "cannot be read as a CSV file"),
        ("0,target\n1.0,0\n2.0,1\n", "cannot be split into parts"),
    ],
)
def test_files_of_another_format(tmp_path: Path, text: str, message: str) -> None:
    workspace = Workspace(tmp_path)
    path = workspace.csv("d", "train")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        workspace.data("d", "train")


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    made_by = r"artificial_data.generate --dataset=d --preset=quick --seed=2 --root="
    with pytest.raises(MissingFileError, match=made_by):
        Workspace(tmp_path, "quick", 2).data("d", "test")


def test_folders_follow_preset_and_seed() -> None:
    assert str(Workspace().csv("d", "train")) == "artificial_datasets/d_train.csv"
    assert Workspace(Path(), "quick", 1).backbone().parent.name == "artificial_checkpoints_quick_1"
    own = Workspace()
    paths = [own.backbone(), own.head(), own.backbone("d", "linear"), own.head("d", "scratch")]
    names = ["mlp_model", "mlp_model_head", "linear_mlp_model_d", "scratch_mlp_model_d_head"]
    assert [path.stem for path in paths] == names
    with pytest.raises(UsageError, match="unknown mode 'lin'"):
        Workspace().backbone("d", "lin")


def test_the_command(tiny: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generation.main([f"--root={tmp_path}"]) == 0
    names = sorted(path.name for path in (tmp_path / "artificial_datasets").glob("*.csv"))
    assert names == sorted(f"dataset{i}_{s}.csv" for i in (1, 2, 3, 4) for s in ("test", "train"))
    words = ["--dataset=mine", "--n-samples=300", "--n_classes=2", "--shuffle"]
    words.append(f"--root={tmp_path}")
    assert generation.main(words) == 0
    assert len(Workspace(tmp_path).data("mine", "test")[1]) == 60
    assert generation.main([f"--root={tmp_path}", "--n-samples=300"]) == 2
    assert "--dataset=NAME" in capsys.readouterr().err
    assert generation.main([f"--root={tmp_path}", "--dataset=dataste2"]) == 2
    assert "choose from dataset2" in capsys.readouterr().err
