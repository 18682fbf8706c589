"""Own data in a table: columns, splits, several labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.identity import fingerprint, labels_of, split_ids
from tangent_arithmetic.data.own.tables import TableSource
from tangent_arithmetic.data.registry import hold_out
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.data.own.conftest import picture

HERE = Path()


def _table(folder: Path, rows: dict[str, Any], ending: str = "csv") -> Path:
    """Writes a table and the images of its first column."""
    path = folder / f"table.{ending}"
    frame = pd.DataFrame(rows)
    for name in dict.fromkeys(frame.iloc[:, 0]):
        if name:
            picture(folder / name)
    if ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    return path


def _read(path: Path, **options: Any) -> Splits:
    return TableSource("mine", path, **options)(HERE)


NAMES = [f"pictures/{i}.png" for i in range(10)]
LABELS = ["big_cat", "dog"] * 5


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("columns", [("path", "label"), ("Filename", "Class"), ("a", "b")])
def test_columns_are_found_or_named(ending: str, columns: tuple[str, str], tmp_path: Path) -> None:
    image, label = columns
    path = _table(tmp_path, {image: NAMES, "extra": list(range(10)), label: LABELS}, ending)
    named = (("image", "a"), ("label", "b")) if image == "a" else ()
    splits = _read(path, columns=named)
    assert splits.classnames == ("big cat", "dog") and splits.source == "table"
    assert (len(splits.train), len(splits.test)) == (8, 2)
    assert sorted(labels_of(splits.test)) == [0, 1]
    assert splits.train[0][0].size == (8, 8)
    assert TableSource("mine", path, named).classnames(HERE) == splits.classnames
    assert fingerprint(splits.train) and split_ids(splits.train)


def test_a_column_of_splits(tmp_path: Path) -> None:
    parts = ["train"] * 6 + ["test"] * 3 + ["valid"]
    splits = _read(_table(tmp_path, {"file": NAMES, "label": LABELS, "split": parts}))
    assert splits.val is not None
    assert [len(part) for part in (splits.train, splits.test, splits.val)] == [6, 3, 1]
    assert hold_out(splits, 0.1, 5000) is splits


@pytest.mark.parametrize("parts", [list(range(5)) * 2, ["x"] * 10])
def test_a_column_without_splits_is_ignored_unless_named(
    parts: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {"file": NAMES, "label": LABELS}
    expected = split_ids(_read(_table(tmp_path, rows)).test)
    path = _table(tmp_path, {**rows, "subset": parts})
    assert split_ids(_read(path).test) == expected
    assert "the column subset of" in caplog.text and "it is ignored" in caplog.text
    with pytest.raises(UsageError, match=r"unknown split '.' .*column subset"):
        _read(path, columns=(("split", "subset"),))
    whole = ["train"] * 9 + ["test"]
    assert len(_read(_table(tmp_path, {**rows, "subset": parts, "fold": whole})).train) == 9
    path = _table(tmp_path, {**rows, "split": whole})
    assert split_ids(_read(path, columns=(("split", ""),)).test) == expected


def test_numbers_as_labels_are_in_their_order(tmp_path: Path) -> None:
    path = _table(tmp_path, {"file": NAMES, "label": [10, 9] * 5})
    assert _read(path).classnames == ("9", "10")
    (tmp_path / "names.txt").write_text("nine\nten\n")
    assert _read(path, names=tmp_path / "names.txt").classnames == ("nine", "ten")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10.0, 9.0] * 5, ("9", "10")),
        (["1", "1.0", "2", "2.0", "-3"] * 2, ("-3", "1", "2")),
        (["1.0|2", "2.0"] * 5, ("1", "2")),
        (["1.0", "a"] * 5, ("1.0", "a")),
    ],
)
def test_integers_as_floats_are_integers(
    labels: list[Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    assert _read(_table(tmp_path, {"file": NAMES, "label": labels})).classnames == names


def test_missing_labels_of_parquet_are_refused(tmp_path: Path) -> None:
    rows = {"file": NAMES, "label": pd.array([1, None] * 5, "Int64")}
    with pytest.raises(UsageError, match=r"has no label in row 2 .*5 such rows"):
        _read(_table(tmp_path, rows, "parquet"))


def test_several_labels(tmp_path: Path) -> None:
    labels = ["cat|dog", "dog", "cat | sun", "", "sun"] * 2
    splits = _read(_table(tmp_path, {"file": NAMES, "labels": labels}))
    assert splits.multilabel and splits.classnames == ("cat", "dog", "sun")
    assert (len(splits.train), len(splits.test)) == (8, 2)
    targets = labels_of(splits.train)
    assert targets.dtype == np.uint8 and targets.shape == (8, 3)
    by_path = dict(zip(NAMES, labels, strict=True))
    for index, name in enumerate(split_ids(splits.train) or ()):
        image, target = splits.train[index]
        named = {part.strip() for part in by_path[f"pictures/{Path(name).name}"].split("|")}
        expected = [int(label in named) for label in splits.classnames]
        assert target.tolist() == targets[index].tolist() == expected and image.mode == "RGB"
    before = fingerprint(splits.train)
    changed = labels.copy()
    changed[0] = "cat|sun"
    pd.DataFrame({"file": NAMES, "labels": changed}).to_csv(tmp_path / "table.csv", index=False)
    assert fingerprint(_read(tmp_path / "table.csv").train) != before


def test_one_label_each_can_be_declared_multi_label(tmp_path: Path) -> None:
    path = _table(tmp_path, {"file": NAMES, "label": LABELS})
    assert labels_of(_read(path, multilabel=True).train).shape == (8, 2)
    lists = _table(tmp_path, {"file": NAMES, "label": [["a"], ["a", "b"]] * 5}, "parquet")
    assert _read(lists).classnames == ("a", "b") and _read(lists).multilabel


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"x": NAMES, "label": LABELS},
            r"has no image \(or text\) column; its columns are x, label",
        ),
        ({"path": NAMES, "y": LABELS}, r"has no label column; its columns are path, y\. Name one"),
        ({"path": NAMES, "label": ["a", ""] * 5}, r"has no label in row 2 .*5 such rows"),
        ({"path": [*NAMES[:9], NAMES[0]], "label": LABELS}, r"twice, in rows 1 and 10"),
        (
            {"path": NAMES, "label": LABELS, "split": ["train", "x"] * 5},
            r"unknown split 'x' .*\?split=",
        ),
        ({"path": NAMES, "label": LABELS, "split": ["test"] * 10}, r"expected a split train"),
        (
            {"path": NAMES, "label": ["a", "b"] * 5, "split": ["train", "test"] * 5},
            r"has classes that the training rows lack: b; remove them",
        ),
    ],
)
def test_wrong_tables_are_refused(rows: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        _read(_table(tmp_path, rows))


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = _table(tmp_path, {"file": NAMES, "label": LABELS})
    (tmp_path / NAMES[3]).unlink()
    with pytest.raises(MissingFileError, match=r"of the 10 images in .*, 1 are missing, .*3\.png"):
        _read(path)
    with pytest.raises(MissingFileError, match=r"none\.csv does not exist"):
        _read(tmp_path / "none.csv")
    (tmp_path / "bad.parquet").write_text(json.dumps({}))
    with pytest.raises(UsageError, match=r"cannot be read as a table \(PARQUET\)"):
        _read(tmp_path / "bad.parquet")
