"""Folders of tiny models and data sets, as the hub has them, on which whole experiments run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tangent_arithmetic.language.tasks import TASKS, Task
from tests.language.makers import drawn, save_tokenizer

TEXT = {
    "good": ["good", "nice", "fine", "great", "love"],
    "bad": ["bad", "awful", "stupid", "idiot", "hate"],
}
NOUNS = ["the", "a", "film", "book", "meal", "hotel", "lamp", "people", "it", "this", "was", "is"]


def sentence(rng: random.Random, mood: str, words: int = 2) -> str:
    """A sentence of a mood."""
    chosen = [rng.choice(NOUNS) for _ in range(words)]
    chosen[rng.randrange(words)] = rng.choice(TEXT[mood])
    return " ".join(chosen)


def rows_of(task: Task, count: int, seed: int) -> dict[str, list[Any]]:
    """Rows of a task: the first sentence's mood decides the label."""
    rng, rows = random.Random(seed), {name: list[Any]() for name in (*task.columns, "label")}
    for index in range(count):
        mood = ("bad", "good")[index % 2]
        for name in task.columns:
            rows[name].append(sentence(rng, mood))
        number = index % 2 if task.is_score or len(task.classes) == 2 else index % 3
        rows["label"].append(1.0 + 3.6 * number if task.is_score else number)
    return rows


def features(task: Task) -> Features:
    """The columns of a task, as the hub declares them."""
    label = ClassLabel(names=list(task.classes)) if task.classes else Value("float32")
    return Features({**{name: Value("string") for name in task.columns}, "label": label})


def splits(task: Task, rows: int) -> DatasetDict:
    """A training split, and one to report on."""
    made = {}
    for seed, split in enumerate(("train", task.test)):
        table = rows_of(task, rows, seed)
        if task.classes and task.repo.endswith("scitail"):  # labels in words
            table["label"] = [task.classes[i] for i in table["label"]]
            made[split] = Dataset.from_dict(table)
        else:
            made[split] = Dataset.from_dict(table, features=features(task))
    return DatasetDict(made)


def write_parquet(found: Mapping[Any, Dataset], folder: Path) -> None:
    """Writes the files of a repository."""
    folder.mkdir(parents=True)
    for split, rows in found.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@dataclass(frozen=True)
class World:
    """The folders."""

    root: Path

    @property
    def data(self) -> Path:
        """The folder of data sets."""
        return self.root / "data"

    def model(self, name: str) -> str:
        """The folder of a model."""
        return str(self.root / name)

    @classmethod
    def made(cls, root: Path, rows: int = 60) -> World:
        """Makes all folders."""
        world = cls(root)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            world._models()
        for name, task in TASKS.items():
            place = world.data / task.repo.rpartition("/")[2]
            found = splits(task, rows)
            if name in ("cola", "snli"):
                found.save_to_disk(place / task.config if task.config else place)
            else:
                write_parquet(found, place / task.config if task.config else place / "data")
        world._texts(rows)
        return world

    def _texts(self, rows: int) -> None:
        """Civil Comments and WikiText."""
        rng = random.Random(0)
        mood = ["bad" if index % 2 else "good" for index in range(rows)]
        comments = Dataset.from_dict(
            {
                "text": [sentence(rng, each) for each in mood],
                "toxicity": [0.9 if each == "bad" else 0.1 for each in mood],
                "insult": [0.0] * rows,
            }
        )
        write_parquet({"train": comments}, self.data / "civil_comments" / "data")
        lines = [line for _ in range(rows // 2) for line in ("", f" {sentence(rng, 'good', 9)} \n")]
        wikitext = Dataset.from_dict({"text": lines})
        write_parquet(
            {"validation": wikitext, "test": wikitext},
            self.data / "wikitext" / "wikitext-103-raw-v1",
        )

    def _models(self) -> None:
        plain, ended = (save_tokenizer(self.root / f"tokenizer{end}", end) for end in (False, True))
        size = len(plain)
        shape: dict[str, Any] = {"n_positions": 1024, "n_embd": 16, "n_layer": 1, "n_head": 2}
        special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        gpt2 = transformers.GPT2Config(vocab_size=size, **shape, **special)
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        special = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        t5 = transformers.T5Config(vocab_size=size, **shape, **special)
        judge = transformers.BertConfig(
            vocab_size=size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            id2label={0: "toxic", 1: "insult"},
            problem_type="multi_label_classification",
        )
        makers: dict[str, tuple[Callable[[], Any], Any]] = {
            "gpt2": (lambda: transformers.GPT2LMHeadModel(gpt2), plain),
            "t5": (lambda: transformers.T5ForConditionalGeneration(t5), ended),
            "judge": (lambda: transformers.BertForSequenceClassification(judge), plain),
        }
        for name, (make, tokenizer) in makers.items():
            drawn(make()).save_pretrained(self.root / name)
            tokenizer.save_pretrained(self.root / name)
