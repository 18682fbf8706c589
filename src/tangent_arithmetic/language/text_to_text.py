"""GLUE as text to text: fine-tuned models, their sum, and answers by generation.

Source: FusionBench (arXiv:2406.03280), whose prompts and measures these are: greedy generation of
at most ten tokens, exact match, and Spearman's correlation for STS-B.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.encoders.backbones.tokenizers import check_fits
from tangent_arithmetic.language.checkpoints import load_seq2seq, load_tokenizer
from tangent_arithmetic.language.finetuning import Vectors, total
from tangent_arithmetic.language.generation import Sampling, generate
from tangent_arithmetic.language.models import PADDING, LanguageModel, Seq2SeqLM, check_positions
from tangent_arithmetic.language.rows import column, labelled
from tangent_arithmetic.language.scoring import MEAN, exact_match, spearman, with_mean
from tangent_arithmetic.language.settings import Settings
from tangent_arithmetic.language.tasks import TASKS, Task
from tangent_arithmetic.language.tokens import TokenRows, encode, padded, paired
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.tangent.linearized import LinearizedModel

ANSWER = Sampling(new_tokens=9)  # ten with the decoder's first token


def prompts_of(task: Task, rows: Any) -> list[str]:
    """The input of each row."""
    columns = [column(rows, name, task.repo) for name in task.columns]
    return [
        task.prompt.format(**dict(zip(task.columns, values, strict=True)))
        for values in zip(*columns, strict=True)
    ]


def answers_of(task: Task, labels: Sequence[int | float]) -> list[str]:
    """The output of each row."""
    if task.is_score:
        return [f"{label:.1f}" for label in labels]
    return [task.answers[int(label)] for label in labels]


class TextToText:
    """Tasks in words for a sequence-to-sequence model, and edits of it.

    Args:
        settings: of the experiment.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model)
        self.base: Seq2SeqLM = load_seq2seq(settings.model).to(settings.device)
        check_positions(self.base, length=settings.length)
        check_fits(self.tokenizer, self.base.model, settings.model)
        self.vectors = Vectors(settings, self.tokenizer)
        self.texts = cache(self._texts)

    def _texts(self, name: str, split: str) -> tuple[list[list[int]], list[str]]:
        """The encoded inputs of a split, and its answers."""
        task, settings = TASKS[name], self.settings
        rows, labels = labelled(name, split, task, settings.data, settings.rows)
        sources = encode(prompts_of(task, rows), self.tokenizer, settings.length)
        return sources, answers_of(task, labels)

    def rows(self, name: str) -> TokenRows:
        """The training rows of a task."""
        sources, answers = self.texts(name, "train")
        targets = encode(answers, self.tokenizer, self.settings.length)
        return TokenRows(paired(sources, targets, self.base.start))

    def vector(self, name: str) -> TaskVector:
        """The task vector of a task."""
        return self.vectors.get(name, self.base, lambda: self.rows(name), load_seq2seq)

    def edited(self, vector: TaskVector, coef: float) -> LanguageModel | LinearizedModel:
        """The model at theta0 + coef * tau, standard or linear."""
        model: LanguageModel | LinearizedModel = vector.apply_to(self.base, coef)
        return model

    def score(self, model: LanguageModel | LinearizedModel, name: str, split: str) -> float:
        """Exact match, or Spearman's correlation, of generated answers on a split of a task."""
        sources, answers = self.texts(name, split)
        size, found = self.settings.eval_batch_size, list[str]()
        for ids in progress(padded(sources).split(size), f"{name}: {split}"):
            found += self._read(generate(model, ids, ANSWER))
        true = self._read(padded(encode(answers, self.tokenizer, self.settings.length)))
        return (spearman if TASKS[name].is_score else exact_match)(found, true)

    def _read(self, ids: torch.Tensor) -> list[str]:
        rows = [row[row != PADDING].tolist() for row in ids]
        texts: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def scores(
        self, model: LanguageModel | LinearizedModel, tasks: Sequence[str], split: str
    ) -> dict[str, float]:
        """The score of each task, and their mean."""
        return with_mean({name: self.score(model, name, split) for name in tasks})


def run(settings: Settings) -> dict[str, Any]:
    """Evaluates the pre-trained model, each fine-tuned one, and the sum of their task vectors.

    The sum's coefficient is the one with the best mean score on validation rows.

    Returns:
        Scores on test rows: `pretrained` and `single` by task, `test` of the sum; `val` of the sum
        at each coefficient; the `coefficient`; hashes of the `weights`.
    """
    study, tasks = TextToText(settings), settings.tasks
    pretrained = study.scores(study.base, tasks, "test")
    vectors = {name: study.vector(name) for name in tasks}
    single = {n: study.score(study.edited(v, 1.0), n, "test") for n, v in vectors.items()}
    added = total(vectors.values())
    val = {c: study.scores(study.edited(added, c), tasks, "val") for c in settings.coefs}
    best = find_optimal_coef(val, MEAN)
    return {
        "pretrained": pretrained,
        "single": with_mean(single),
        "val": {f"{coef:g}": scores for coef, scores in val.items()},
        "coefficient": best,
        "test": study.scores(study.edited(added, best), tasks, "test"),
        "weights": study.vectors.hashes,
    }
