from __future__ import annotations

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from tangent_arithmetic.language.rows import column, labelled, labels_of, read_split
from tangent_arithmetic.language.scoring import exact_match, spearman
from tangent_arithmetic.language.tasks import GLUE_8, NLI_6, TASKS, Task
from tangent_arithmetic.language.text_to_text import answers_of, prompts_of
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tests.language.worlds import World, write_parquet

PROMPTS = {  # of tanganke/fusion_bench, glue_prompt_templates.py
    "cola": 'Indicate if the following sentence is grammatically correct or not: "S". '
    "Answere 'acceptable' or 'unacceptable'.",
    "mnli": "Does the premise: 'P' logically imply, contradict, or is neutral to the hypothesis: "
    "'H'? Answere with 'entailment', 'contradiction', or 'neutral'.",
    "mrpc": "Are the following sentences 'S1' and 'S2' conveying the same meaning? "
    "Answere with 'yes' or 'no'.",
    "qnli": "Given the context: 'S', does the question 'Q' have an answer based on the information "
    "provided? Answer with 'yes' or 'no'.",
    "qqp": "Do the questions 'Q1' and 'Q2' have the same intent? Answere with 'yes' or 'no'.",
    "rte": "Does the text: 'S1' entail that 'S2' is true? Provide 'yes' or 'no'.",
    "sst2": "Given the sentence 'S', determine the sentiment. Is it positive or negative?",
    "stsb": "Consider the sentences 'S1' and 'S2'. On a scale from 1 (completely different) to 5 "
    "(completely similar), rate the similarity.",
}
SHORT = {
    "sentence": "S", "sentence1": "S1", "sentence2": "S2", "question": "Q", "question1": "Q1",
    "question2": "Q2", "premise": "P", "hypothesis": "H",
}  # fmt: skip
ANSWERS = {
    "cola": ["unacceptable", "acceptable"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "mrpc": ["no", "yes"],
    "qnli": ["yes", "no"],
    "qqp": ["no", "yes"],
    "rte": ["yes", "no"],
    "sst2": ["negative", "positive"],
}


@pytest.mark.parametrize("name", GLUE_8)
def test_prompts_are_fusionbench_s_to_the_letter(name: str) -> None:
    task = TASKS[name]
    rows = Dataset.from_dict({text: [SHORT[text]] for text in task.columns})
    assert prompts_of(task, rows) == [PROMPTS[name]]
    if name == "stsb":
        assert answers_of(task, [3.75, 5.0]) == ["3.8", "5.0"]
    else:
        assert answers_of(task, range(len(task.classes))) == ANSWERS[name]


@pytest.mark.parametrize("name", sorted({*GLUE_8, *NLI_6}))
def test_every_layout_is_read(world: World, name: str) -> None:
    task = TASKS[name]
    parts = {split: labelled(name, split, task, world.data) for split in ("train", "val", "test")}
    assert [len(labels) for _, labels in parts.values()] == [54, 6, 60]
    texts = {
        s: list(zip(*(rows[c] for c in task.columns), strict=True))
        for s, (rows, _) in parts.items()
    }
    assert len({*texts["train"], *texts["val"]}) > len({*texts["train"]})
    labels = parts["test"][1]
    if not task.is_score:
        assert set(labels) == set(range(len(task.classes)))
    assert len(labelled(name, "test", task, world.data, most=7)[1]) == 7


def test_what_has_no_label_is_left_out() -> None:
    rows = Dataset.from_dict(
        {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [2, -1, 0]},
        features=Features(
            {
                "premise": Value("string"),
                "hypothesis": Value("string"),
                "label": ClassLabel(names=["contradiction", "neutral", "entailment"]),
            }
        ),
    )
    assert labels_of("snli", TASKS["snli"], rows) == [0, -1, 2]  # by name, not by number
    plain = Dataset.from_dict({"label": [1, None, 0]})
    assert labels_of("rte", TASKS["rte"], plain) == [1, -1, 0]
    for numbers in ([1.0, None, 0.0], [True, None, False], [1.0, -1.0, 0.0]):
        table = Dataset.from_dict({"label": numbers})
        assert labels_of("rte", TASKS["rte"], table) == [1, -1, 0]
    words = Dataset.from_dict({"label": [None, "neutral", "-", "ENTAILS"]})
    assert labels_of("scitail", TASKS["scitail"], words) == [-1, 1, -1, 0]


def test_rows_without_a_score_are_left_out(tmp_path: Path) -> None:
    scored = Dataset.from_dict({"label": [3.5, None, 1.0]})
    write_parquet({"validation": scored}, tmp_path / "glue" / "stsb")
    assert labelled("stsb", "test", TASKS["stsb"], tmp_path)[1] == [3.5, 1.0]


BAD = {
    "other classes": ({"label": ["maybe"]}, "has the labels maybe, expected entails, neutral"),
    "numbers beyond": ({"label": [7]}, "has the labels 7, expected"),
    "between numbers": ({"label": [0.5]}, "has the labels 0.5, expected"),
    "no labels at all": ({"label": [-1, -1]}, "no row of this split of allenai/scitail has"),
    "no column": ({"gold": [0]}, "no column 'label'; expected it among gold"),
}


@pytest.mark.parametrize("table, message", BAD.values(), ids=BAD)
def test_odd_labels_are_refused(table: dict[str, list[object]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        labels_of("scitail", TASKS["scitail"], Dataset.from_dict(table))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"glue/cola has no split train; expected train-"):
        read_split("nyu-mll/glue", "cola", "train", tmp_path)
    with pytest.raises(MissingFileError, match="cannot be loaded"):
        read_split("nyu-mll/glue", "cola", "train", None)  # without a network
    write_parquet({"train": Dataset.from_dict({"text": ["a"]})}, tmp_path / "glue" / "cola")
    (tmp_path / "glue" / "cola" / "train-00000-of-00001.parquet").write_bytes(b"PAR1, not")
    with pytest.raises(UsageError, match="cannot be read as a parquet file"):
        read_split("nyu-mll/glue", "cola", "train", tmp_path)
    with pytest.raises(UsageError, match="no column 'b'; expected it among a"):
        column(Dataset.from_dict({"a": [1]}), "b", "a set")


def test_a_split_saved_alone_is_read(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "civil_comments")
    assert read_split("google/civil_comments", None, "train", tmp_path)["text"][:] == ["a", "b"]
    with pytest.raises(MissingFileError, match=r"no split test; .* a DatasetDict written by"):
        read_split("google/civil_comments", None, "test", tmp_path)


def test_measures_of_answers() -> None:
    assert exact_match(["yes", "no ", "yes"], ["yes", "no", "no"]) == pytest.approx(1 / 3)
    assert spearman(["1.0", "what", "5"], ["1.5", "0.0", "3.0"]) == pytest.approx(1.0)
    assert spearman(["2.0", "2.0"], ["1.0", "3.0"]) == 0.0
    assert spearman(["nan", "1", "infinity", "2"], ["0", "1", "0", "2"]) == pytest.approx(1.0)
    assert Task("a/b", None, ("text",), ()).is_score
