"""Results as one table: the values of the files, whichever folder is named and however damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import tangent_arithmetic
from tangent_arithmetic.run.frames import COLUMNS, load_results
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

COMMITTED = Path(__file__).resolve().parent.parent.parent / "results"
MODEL = COMMITTED / "embedded" / "ViT-Nano-8_seed1"


def one(table: pd.DataFrame, **wanted: Any) -> float:
    """The value of the only row with these entries."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    assert len(table) == 1, table
    return float(table["value"].iloc[0])


def written(folder: Path, **files: Any) -> Path:
    """A folder with these JSON files; `__` in a name stands for a hyphen."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name.replace('__', '-')}.json").write_text(text)
    return folder


def test_the_committed_values_are_those_of_the_files() -> None:
    table = load_results(MODEL)
    assert tuple(table.columns) == COLUMNS
    assert set(table["seed"]) == {1} and set(table["suite"]) == {"embedded"}
    single = json.loads((MODEL / "posthoc_ft_accuracies.json").read_text())
    added = json.loads((MODEL / "linear_additions.json").read_text())
    negated = json.loads((MODEL / "negations.json").read_text())["MNIST"]
    rows = {"mode": "posthoc", "method": "single", "metric": "top1", "coefficient": 1.0}
    assert one(table, split="test", task="Signs", **rows) == single["Signs"]
    assert one(table, split="validation", task="Signs", **rows) == single["SignsVal"]
    rows = {"mode": "linear", "method": "addition"}
    for coef, metrics in added["val"].items():
        at = {**rows, "split": "validation", "coefficient": float(coef)}
        mean = metrics["avg_normalized_top1"]
        assert one(table, task="mean", metric="normalized_top1", **at) == mean
        assert one(table, task="Emoji", metric="top1", **at) == metrics["EmojiVal:top1"]
    at = {**rows, "split": "test", "coefficient": added["coefficient"]}
    assert one(table, task="mean", metric="top1", **at) == added["test"]["avg_top1"]
    rows = {"mode": "standard", "method": "negation", "task": "MNIST"}
    at = {**rows, "split": "test", "coefficient": negated["coefficient"]}
    assert one(table, metric="control_top1", **at) == negated["test_control"]
    assert one(table, metric="top1", **at) == negated["test"]
    start = {**rows, "split": "test", "coefficient": 0.0}
    assert one(table, metric="control_top1", **start) == negated["zeroshot_control"]
    at = {**rows, "split": "validation", "coefficient": 0.5, "metric": "control_top1"}
    assert one(table, **at) == negated["val"]["0.5"]["ShapesVal:top1"]


def test_a_root_holds_the_rows_of_its_folders() -> None:
    table = tangent_arithmetic.load_results(COMMITTED)
    folders = sorted({path.parent for path in COMMITTED.rglob("zeroshot_accuracies.json")})
    runs = [load_results(folder) for folder in folders]
    assert len(runs) >= 10 and set(table["seed"]) == {0, 1, 2, 3}
    assert set(table["suite"]) == {"embedded", "text"}
    pd.testing.assert_frame_equal(table, pd.concat(runs, ignore_index=True))


def test_composed_modes_are_named_by_their_files(tmp_path: Path) -> None:
    name = "linear+attn.*q"
    sums = {"test": {"A:top1": 0.25}, "coefficient": 0.5, "test_at_1": {"A:top1": 0.125}}
    sums |= {"interference": {"A": {"A": 0.5}}}
    folder = written(
        tmp_path / "own" / "model",
        linear_taujp_additions={**sums, "provenance": {"mode": "linear+taujp"}},
        linear_taujp_additions__A={**sums, "provenance": {"mode": "linear+taujp"}},
        **{f"{MODES[name].prefix}ft_accuracies": {"A": 0.75, "provenance": {"mode": name}}},
        linear_tak_ft_accuracies={"A": 0.5},
    )
    table = load_results(folder)
    assert set(table["mode"]) == {"linear+taujp", name}
    assert set(table["method"]) == {"single", "addition", "addition A"}
    rows = {"mode": "linear+taujp", "method": "addition", "split": "test", "task": "A"}
    assert one(table, coefficient=0.5, **rows) == 0.25
    assert one(table, coefficient=1.0, **rows) == 0.125
    assert one(table, mode=name) == 0.75


def test_files_without_provenance_are_placed_by_their_folders(tmp_path: Path) -> None:
    sums = {"test": {"A:map": 0.5, "A:num_images": 7, "avg_map": 0.5}, "coefficient": None}
    folder = written(
        tmp_path / "own" / "some-model_seed7_sample50",
        additions__A_plus_B={"test": {"A:top1": 0.25}, "coefficient": 0.5},
        merging__ties={**sums, "merge": {"label": "TIES"}},
        unrelated={"A": 1},
    )
    table = load_results(folder)
    assert set(table["suite"]) == {"own"} and set(table["seed"]) == {7}
    assert set(table["model"]) == {"some-model_sample50"}
    assert set(table["method"]) == {"addition A_plus_B", "merging TIES"}
    assert one(table, metric="map", task="A") == 0.5
    assert one(table, metric="map", task="mean") == 0.5
    assert one(table, metric="num_images") == 7
    assert one(table, metric="top1", coefficient=0.5, split="test") == 0.25


def test_what_is_damaged_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "embedded" / "ViT-Nano-8_seed1"
    shutil.copytree(MODEL, folder)
    written(folder, linear_additions='{"test": {"Em', ft_accuracies={"Emoji": "x", "Signs": 0.5})
    table = load_results(tmp_path)
    assert table.query("mode == 'linear' and method == 'addition'").empty
    single = table.query("mode == 'standard' and method == 'single'")
    assert list(single["task"]) == ["Signs"] and list(single["value"]) == [0.5]
    assert "linear_additions.json is left out" in caplog.text
    assert "ft_accuracies.json is damaged" in caplog.text


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"found none. Make them with: tangent-arithmetic eval"):
        load_results(tmp_path)
    with pytest.raises(MissingFileError, match="expected a folder of results"):
        load_results(tmp_path / "none")


def test_negations_name_the_metric_of_each_set(tmp_path: Path) -> None:
    sweep = {"0.5": {"AVal:map": 0.4, "CVal:top1": 0.8, "CVal:balanced": 0.7}}
    record = {"val": sweep, "coefficient": 0.5, "test": 0.3, "test_control": 0.75}
    table = load_results(written(tmp_path / "own" / "model", negations={"A": record}))
    at = {"split": "test", "task": "A", "coefficient": 0.5}
    assert one(table, metric="map", **at) == 0.3
    assert one(table, metric="control_top1", **at) == 0.75
