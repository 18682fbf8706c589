"""Data sets of texts: tables, the hub's layout, Python, padding, order and identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tangent_arithmetic.data import loading
from tangent_arithmetic.data.base import SubsetPictures
from tangent_arithmetic.data.identity import fingerprint, labels_of, pictures_hash, split_ids
from tangent_arithmetic.data.leaks import refuse_pair
from tangent_arithmetic.data.loading import BatchPlan, EvalBatches
from tangent_arithmetic.data.own.hubs import HubSource
from tangent_arithmetic.data.own.tables import TableSource, read_table
from tangent_arithmetic.data.plain import plain_splits
from tangent_arithmetic.data.texts import PADDING, Texts, lengths_of
from tangent_arithmetic.runtime.errors import PictureError, UsageError

HERE = Path()
ROWS = [
    (f"{word} {noun} {i}", label)
    for i in range(5)
    for word, label in (("good", "positive"), ("bad", "negative"))
    for noun in ("film", "soup")
]
ENDINGS = ("csv", "tsv", "parquet", "jsonl")


class Characters:
    """A transform: a token for each character."""

    reads_texts = True

    def __call__(self, text: str) -> torch.Tensor:
        return torch.tensor([ord(letter) for letter in text])


class Counting(Characters):
    """Of fewer letters it makes more tokens."""

    def lengths(self, texts: list[str]) -> list[int]:
        return [10 - len(text) for text in texts]


def write(folder: Path, columns: dict[str, list[Any]], ending: str) -> Path:
    path, frame = folder / f"table.{ending}", pd.DataFrame(columns)
    if ending == "parquet":
        frame.to_parquet(path)
    elif ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if ending == "tsv" else ",")
    return path


def columns_of(rows: list[tuple[str, str]], text: str = "text") -> dict[str, list[Any]]:
    return {text: [row[0] for row in rows], "label": [row[1] for row in rows]}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("column", ["text", "Review", "words"])
def test_a_table_of_texts(ending: str, column: str, tmp_path: Path) -> None:
    path = write(tmp_path, columns_of(ROWS, column), ending)
    named = (("text", "words"),) if column == "words" else ()
    splits = TableSource("mine", path, named)(HERE)
    assert splits.classnames == ("negative", "positive") and splits.source == "table"
    assert (len(splits.train), len(splits.test)) == (16, 4)
    text, label = splits.train[0]
    assert (text, splits.classnames[label]) in ROWS
    assert sorted(labels_of(splits.test)) == [0, 0, 1, 1]
    assert set(split_ids(splits.train) or ()).isdisjoint(split_ids(splits.test) or ())
    assert fingerprint(splits.train) and len(pictures_hash(splits.train)) == 64


def test_a_column_of_splits_and_labels_that_are_numbers(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "sentence": [f"text {i}" for i in range(12)],
        "label": [10, 2] * 6,
        "split": ["train"] * 8 + ["validation"] * 2 + ["test"] * 2,
    }
    splits = TableSource("mine", write(tmp_path, columns, "jsonl"))(HERE)
    assert splits.classnames == ("2", "10") and splits.val is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 2, 2)


def test_several_labels_a_text(tmp_path: Path) -> None:
    rows = {"text": [f"text {i}" for i in range(10)], "label": ["a|b", "b"] * 5}
    splits = TableSource("mine", write(tmp_path, rows, "csv"))(HERE)
    assert splits.multilabel and labels_of(splits.train).shape == (8, 2)


@pytest.mark.parametrize(
    "columns, options, message",
    [
        (
            {"words": ["a"], "label": ["b"]},
            (),
            r"no image \(or text\) column.*words, label\. Name one as in .*\?text=COLUMN or \?",
        ),
        ({"text;label": ["a;b"]}, (), r"\?text=COLUMN.*; if ; separates columns, save it with com"),
        (
            {"file": ["a.txt"], "text": ["a"], "label": ["b"]},
            (),
            r"1 are missing, .*; for the texts in the column text write mine=table\.csv\?text=text",
        ),
        ({"text": ["a"], "label": ["b"]}, (("text", "body"),), "has no column body.*text=COLUMN"),
        ({"text": ["a", " "], "label": ["b", "c"]}, (), "has no text in row 2"),
        ({"text": ["a", "d"], "label": ["b", ""]}, (), "has no label in row 2"),
        (
            {"text": ["a"], "label": ["b"]},
            (),
            "1 text, at most .* cannot be split .* Add texts, or",
        ),
        (
            {"text": ["a"], "label": ["b"]},
            (("text", "text"), ("image", "text")),
            "image and text columns are both named",
        ),
    ],
)
def test_bad_tables_are_refused(
    columns: dict[str, Any], options: tuple[tuple[str, str], ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        TableSource("mine", write(tmp_path, columns, "csv"), options)(HERE)


@pytest.mark.parametrize(("ending", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_text_that_is_cut_in_two_is_refused(ending: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / f"table.{ending}"
    path.write_text("text,label\nwell, good,1\nbad, very,0\n".replace(",", mark))
    with pytest.raises(UsageError, match=r"more fields than its 2 columns in row 1; put texts"):
        TableSource("mine", path)(HERE)


def test_quotation_marks_of_a_tsv_are_of_the_text_or_quote_cells(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    rows = ["text\tlabel", '"So good\t1', 'a "fun" one\t1', 'the end"\t0', '"He said ""no"""\t0']
    path.write_text("\n".join(rows))
    texts = ['"So good', 'a "fun" one', 'the end"', 'He said "no"']
    assert read_table(path).to_dict("list") == {"text": texts, "label": ["1", "1", "0", "0"]}
    path.write_text('text\tlabel\n"two\nlines"\t1\n"a\ttab"\t0\n')
    assert read_table(path)["text"].tolist() == ["two\nlines", "a\ttab"]
    path.write_text('text\tlabel\n"So good\t1\na "fun" one\t1\tmore\n')
    with pytest.raises(UsageError, match=r"wrongly in the row that begins in line 2 .*; put texts"):
        read_table(path)
    path.write_text('text\tlabel\tnote\n"Great" film\t1\n"So bad\t0\tsad\n')  # a cell is missing
    assert read_table(path)["text"].tolist() == ['"Great" film', '"So bad']


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quotation_mark_of_a_csv_joins_no_rows(end: str, tmp_path: Path) -> None:
    path, good = tmp_path / "table.csv", ['"two\nlines, ""and"" more",pos', 'a "fun" one,neg']
    path.write_bytes(end.join(["text,label", *good]).encode("utf-8-sig"))
    assert read_table(path)["text"].tolist() == ['two\nlines, "and" more', 'a "fun" one']
    stray = ['"Great film,pos', "poor,neg"]
    for rest in (['he said "no",neg', "fine,pos"], []):
        path.write_bytes(end.join(["text,label", *good, *stray, *rest]).encode())
        with pytest.raises(UsageError, match=r"quoted wrongly in the row that begins in line 5 "):
            TableSource("mine", path)(HERE)


def test_cells_of_parquet_are_texts_in_utf8(tmp_path: Path) -> None:
    path, labels = tmp_path / "table.parquet", ["pos", "neg"] * 2
    texts = [f"schöner film {i}" for i in range(4)]
    cells = [text.encode() for text in texts]
    rows = {"text": cells, "label": [label.encode() for label in labels], "id": [{"a": 1}] * 4}
    pd.DataFrame(rows).to_parquet(path)
    splits = TableSource("mine", path)(HERE)
    assert splits.classnames == ("neg", "pos")
    parts = (splits.train, splits.test)
    assert sorted(part[i][0] for part in parts for i in range(len(part))) == texts
    for strange, message in ((b"\xff", "bytes that are not UTF-8"), ({"a": 1}, "several values")):
        pd.DataFrame({"text": [strange], "label": ["pos"]}).to_parquet(path)
        with pytest.raises(UsageError, match=rf"{message} in row 1 of the column text; expected"):
            TableSource("mine", path)(HERE)
    pd.DataFrame({"text": [["a", "b"]] * 4, "label": labels}).to_parquet(path)
    with pytest.raises(UsageError, match="several values in row 1 of the column text"):
        TableSource("mine", path)(HERE)


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("text,label\nschön,gut\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"table\.csv .*UnicodeDecodeError.*; save it as UTF-8"):
        TableSource("mine", path)(HERE)


def test_a_text_that_is_there_twice_is_for_training(tmp_path: Path) -> None:
    rows = [*ROWS, ("good film 0", "positive"), ("bad soup 3", "negative")]
    splits = TableSource("mine", write(tmp_path, columns_of(rows), "csv"))(HERE)
    tested = {splits.test[i][0] for i in range(len(splits.test))}
    assert tested.isdisjoint({"good film 0", "bad soup 3"})


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_rows_of_the_hub(kind: str, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        {"idx": Value("int64"), "sentence": Value(kind), "label": ClassLabel(names=["no", "yes"])}
    )
    rows = {"idx": [1, 2, 3, 4], "sentence": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}
    parts = {split: Dataset.from_dict(rows, features=features) for split in ("train", "test")}
    for split, rows_of in DatasetDict(parts).items():
        rows_of.to_parquet(tmp_path / f"{split}.parquet")
    splits = HubSource("mine", str(tmp_path))(HERE)
    assert splits.classnames == ("no", "yes") and splits.train[1] == ("b", 1)
    with pytest.raises(UsageError, match=r"expected one text column.*no column body"):
        HubSource("mine", str(tmp_path), (("text", "body"),))(HERE)


def test_labels_of_the_hub_that_are_whole_floats_are_integers(tmp_path: Path) -> None:
    from datasets import Dataset

    def read(labels: list[Any]) -> Any:
        Dataset.from_dict({"text": list("abcd"), "label": labels}).to_parquet(file)
        return HubSource("mine", str(tmp_path))(HERE)

    file = tmp_path / "train.parquet"
    splits = read([1.0, 0.0] * 2)
    assert (
        splits.classnames == ("0", "1") and labels_of(splits.train.pictures).tolist() == [1, 0] * 2
    )
    for odd, said in ((0.5, "0.5"), (None, "None")):
        with pytest.raises(UsageError, match=f"has the value {said} in its train split, expected"):
            read([1.0, odd] * 2)
    with pytest.raises(UsageError, match="has the value '' in its train split"):
        read(["a", ""] * 2)


ITEMS = [(text, ["negative", "positive"].index(label)) for text, label in ROWS]


@pytest.mark.parametrize("kind", ["pandas", "dicts", "datasets", "datasets with names"])
def test_rows_by_column_are_data_sets_of_python(kind: str) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [{"id": i, "Text": text, "label": label} for i, (text, label) in enumerate(ITEMS)]
    names: Any = ("negative", "positive")
    if kind == "pandas":
        data: Any = pd.DataFrame(rows, index=range(5, 5 + len(rows)))
    elif kind == "dicts":
        data = rows
    elif kind == "datasets":
        data = Dataset.from_list(rows)
    else:
        label, names = ClassLabel(names=list(names)), None
        features = Features({"id": Value("int64"), "Text": Value("string"), "label": label})
        data = Dataset.from_list(rows, features=features)
    splits = plain_splits("mine", data, data, classnames=names)
    assert [splits.train[i] for i in range(len(ITEMS))] == ITEMS
    assert splits.classnames == ("negative", "positive")


@pytest.mark.parametrize(
    "data, message",
    [
        ({"a": 1}, "expected a map-style data set, .*got a dict"),
        (
            [{"title": "a", "label": 1}],
            r"the columns text \(or image\) and label, got title, label",
        ),
        ([{"text": "a", "stars": 1}], r"and label, got text, stars; rename them"),
        ([("a", "pos")], r"mine\[0\] has the label pos, expected an integer from 0 to 1"),
        ([("a", 0.5)], "has the label 0.5, expected an integer"),
        ([("a\ud83d", 0)], r"text 0 of mine \('a.ud83d'\) has half of a surrogate pair"),
        ([("a", 0), ("b", 1)], "2 texts, at most one .* Add texts, or give it a test split"),
    ],
)
def test_other_data_sets_of_python_are_refused(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plain_splits("mine", data, None, classnames=("negative", "positive"))


@pytest.mark.parametrize("kind", [bool, float, np.int8, np.float32, torch.tensor])
def test_labels_of_python_are_whole_numbers_of_any_type(kind: Any) -> None:
    splits = plain_splits("mine", [(t, kind(y)) for t, y in ITEMS], None, None, ("no", "yes"))
    assert isinstance(splits.train, SubsetPictures)
    assert labels_of(splits.train.pictures).tolist() == [label for _, label in ITEMS]


def test_python_data_sets_of_texts() -> None:
    splits = plain_splits("mine", ITEMS, None, classnames=("negative", "positive"))
    assert isinstance(splits.train, SubsetPictures) and splits.train[0][0] in dict(ROWS)
    for wrong in ("", None, 3):
        with pytest.raises(PictureError, match=r"mine\[1\] is .*expected a text"):
            plain_splits("mine", [("a", 0), (wrong, 1)], None, classnames=("a", "b"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_sorted_by_length_and_padded(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts(("ccc", "a", "dddd", "bb"), np.array([2, 0, 3, 1]))
    batches = EvalBatches(texts, Characters(), batch_size=2, num_workers=workers)
    (one, first), (two, second) = batches
    assert first.tolist() == [0, 1] and second.tolist() == [2, 3] and batches.order == [1, 3, 0, 2]
    assert one.tolist() == [[97, PADDING], [98, 98]]
    assert two.tolist() == [[99, 99, 99, PADDING], [100] * 4]
    lengths = lengths_of(SubsetPictures(texts, [2, 1]))
    assert lengths is not None and lengths.tolist() == [4, 1]
    by_tokens = Counting()  # the model's own measure, where it has one
    lengths = lengths_of(SubsetPictures(texts, [0, 2, 3]), by_tokens)
    assert lengths is not None and lengths.tolist() == [7, 6, 8]
    assert EvalBatches(texts, by_tokens).order == [2, 0, 3, 1]
    plan = BatchPlan.of(texts, by_tokens, 2)
    assert {frozenset(keys) for keys in plan.permutation(0).reshape(2, 2).tolist()} == {
        frozenset((2, 0)),
        frozenset((3, 1)),
    }
    monkeypatch.setattr(loading, "TOKENS", 6)
    assert EvalBatches(texts, Characters()).groups == [[1, 3], [0], [2]]
    assert list(EvalBatches(texts, Characters(), rank=4, world_size=5)) == []  # no text is left
    shares = [EvalBatches(texts, None, rank=rank, world_size=2).order for rank in range(2)]
    assert shares == [[1, 0], [3, 2]]


def test_fingerprint_changes_with_texts_and_labels() -> None:
    one = Texts(("a", "b"), np.array([0, 1]))
    others = [Texts(("a", "c"), np.array([0, 1])), Texts(("a", "b"), np.array([1, 1]))]
    assert len({fingerprint(each) for each in (one, *others)}) == 3
    assert fingerprint(one) == fingerprint(Texts(("a", "b"), np.array([0, 1]), "elsewhere"))


def test_texts_in_two_splits_are_found(caplog: pytest.LogCaptureFixture) -> None:
    one, labels = ("a", "b", "c"), np.zeros(3, np.int64)
    refuse_pair(Texts(one, labels), Texts(("d", "e"), labels))
    assert not caplog.records
    refuse_pair(Texts(one, labels), Texts(("d", "b", "e"), labels, "mine"))
    (record,) = caplog.records
    assert "1 of the 3 examples of a split are in another, such as text 1" in record.message
    assert "text 1 of mine ('b')" in record.message
    with pytest.raises(UsageError, match="two splits"):
        refuse_pair(Texts(one, labels), Texts(("a", "b", "e"), labels))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty; expected an object a line, such as"),
        (json.dumps([{"text": "a", "label": 1}]), "line 1 is a JSON list; expected an object"),
        ('{"text": "a", "label": 1}\n\n3', "line 3 is a JSON int; expected an object a line"),
        ('{"text": "a", "label": 1}\n{"text', r"line 2 is no JSON \(.*\); expected an object"),
        ('{"text": "a\\ud83d", "label": 1}', "has half of a surrogate pair"),
    ],
)
def test_lines_that_are_no_json_objects_are_refused(
    content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "table.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        TableSource("mine", tmp_path / "table.jsonl")(HERE)


def test_values_of_json_lines_are_those_of_the_file(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": 10**30, "text": f"a\u2028{i}", "label": 0.1} for i in range(4)]
    rows += [{"date": 2000, "text": f"b\n{i}", "label": 1} for i in range(4)]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert read_table(path)["date"].dropna().tolist() == [2000] * 4
    splits = TableSource("mine", path)(HERE)
    assert splits.classnames == ("0.1", "1") and len(splits.train) + len(splits.test) == 8


def test_labels_in_float32_are_those_that_were_written(tmp_path: Path) -> None:
    rows = {"text": list("abcd"), "label": np.array([0.1, 1.0] * 2, np.float32)}
    pd.DataFrame(rows).to_parquet(tmp_path / "table.parquet")
    assert TableSource("mine", tmp_path / "table.parquet")(HERE).classnames == ("0.1", "1")
