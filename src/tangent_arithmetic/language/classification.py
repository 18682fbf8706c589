r"""Texts classified from the last token: a body that tasks share, and a head for each.

Vectors of the bodies are added; each task keeps the head that was trained with it. A linear model's
logits are \(f_0 + a\,d + h\), \(d\) along the sum of the bodies' vectors and \(h\) along the task's
head, so that one pass over a task gives every coefficient.

Source: the seven GLUE tasks of GPT-2 in FusionBench (arXiv:2406.03280); the six of natural language
inference with T5 of the papers on tangent arithmetic of 2025 and 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.coefficients import find_optimal_coef
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.encoders.backbones.tokenizers import check_fits
from tangent_arithmetic.language.checkpoints import facts_of, load_classifier, load_tokenizer
from tangent_arithmetic.language.finetuning import Vectors, total
from tangent_arithmetic.language.models import TextClassifier, check_positions
from tangent_arithmetic.language.rows import column, labelled
from tangent_arithmetic.language.scoring import MEAN, with_mean
from tangent_arithmetic.language.settings import Settings
from tangent_arithmetic.language.tasks import TASKS
from tangent_arithmetic.language.tokens import TokenRows, encode, padded
from tangent_arithmetic.runtime.logs import progress
from tangent_arithmetic.storage.statedict import State, copy_into, move_into
from tangent_arithmetic.tangent.caches import empty_caches
from tangent_arithmetic.tangent.linearized import LinearizedModel


class Classification:
    """Classification tasks for one body.

    Args:
        settings: of the experiment.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model)
        self.vectors = Vectors(settings, self.tokenizer)
        self.base = cache(self._base)

    def _base(self, name: str) -> TextClassifier:
        """The pre-trained body with the head from which a task's model was fine-tuned.

        Of models fine-tuned elsewhere it is unknown: the trained head is taken, whose vector is 0.
        """
        settings, classes = self.settings, len(TASKS[name].classes)
        finetuned = settings.finetuned.get(name)
        seed = settings.seed if finetuned is None else facts_of(finetuned).get("seed")
        base = load_classifier(settings.model, classes, seed or 0)
        check_positions(base, length=settings.length)
        check_fits(self.tokenizer, base.model, settings.model)
        if finetuned is not None and seed is None:
            trained = load_classifier(finetuned)
            new, own = (m.get_submodule(m.head).state_dict() for m in (base, trained))
            copy_into(new, own, f"the head of {settings.model} for {name} and that of {finetuned}")
        return base.to(settings.device)

    def rows(self, name: str, split: str) -> TokenRows:
        """The encoded rows of a split, with labels."""
        task, settings = TASKS[name], self.settings
        rows, labels = labelled(name, split, task, settings.data, settings.rows)
        first, *second = (column(rows, text, task.repo) for text in task.columns)
        ids = encode(first, self.tokenizer, settings.length, second[0] if second else None)
        return TokenRows(padded(ids), torch.tensor(labels))

    def vector(self, name: str) -> TaskVector:
        """The task vector of a task, of body and head."""
        return self.vectors.get(
            name, self.base(name), lambda: self.rows(name, "train"), load_classifier
        )

    def sweep(
        self, name: str, split: str, body: State, head: State, coefs: Sequence[float]
    ) -> dict[float, float]:
        """Accuracy with the task's head and the body at theta0 + coef * tau, for each coefficient.

        Args:
            name: the task.
            split: val or test.
            body: the vector of the body.
            head: that of the task's head.
            coefs: the coefficients.
        """
        rows = self.rows(name, split)
        sweep = self._linear if self.settings.applies_linear else self._standard
        correct = sweep(self.base(name), rows, body, head, coefs)
        return {c: n / len(rows) for c, n in zip(coefs, correct.tolist(), strict=True)}

    @torch.no_grad()
    def _linear(
        self,
        base: TextClassifier,
        rows: TokenRows,
        body: State,
        head: State,
        coefs: Sequence[float],
    ) -> Tensor:
        model, correct = LinearizedModel(base), torch.zeros(len(coefs))
        for ids, labels in self._batches(rows):
            f0, (step, ahead) = model.tangents(ids, [body, head])
            found = [(f0 + ahead + coef * step).argmax(dim=1) for coef in coefs]
            correct += (torch.stack(found) == labels).sum(dim=1).cpu()
        return correct

    @torch.no_grad()
    def _standard(
        self,
        base: TextClassifier,
        rows: TokenRows,
        body: State,
        head: State,
        coefs: Sequence[float],
    ) -> Tensor:
        model: TextClassifier = TaskVector(vector=head).apply_to(base)
        target, theta = dict(model.named_parameters()), dict(base.named_parameters())
        correct = torch.zeros(len(coefs))
        for index, coef in enumerate(coefs):
            move_into(target, theta, body, coef)
            empty_caches(model)
            for ids, labels in self._batches(rows):
                correct[index] += (model(ids).argmax(dim=1) == labels).sum().cpu()
        return correct

    def _batches(self, rows: TokenRows) -> Any:
        size, device = self.settings.eval_batch_size, self.settings.device
        assert rows.labels is not None
        pairs = list(zip(rows.ids.split(size), rows.labels.split(size), strict=True))
        for ids, labels in progress(pairs, "classification"):
            yield ids.to(device), labels.to(device)


def parts(vector: TaskVector, head: str) -> tuple[TaskVector, dict[str, Tensor]]:
    """The vector of the body, and that of the head."""
    own = {name: value for name, value in vector.vector.items() if name.startswith(f"{head}.")}
    body = {name: value for name, value in vector.vector.items() if name not in own}
    return type(vector)(vector=body), own


def run(settings: Settings) -> dict[str, Any]:
    """Evaluates each fine-tuned model, and each task under the sum of all bodies' vectors.

    The sum's coefficient is the one with the best mean accuracy on validation rows.

    Returns:
        Accuracy on test rows: `single` and `body0`, the pre-trained body under the trained head, by
        task, `test` of the sum; `val` of the sum at each coefficient; the `coefficient`; hashes of
        the `weights`.
    """
    study, tasks = Classification(settings), settings.tasks
    bodies, heads = {}, {}
    for name in tasks:
        bodies[name], heads[name] = parts(study.vector(name), study.base(name).head)
    ends = {
        name: study.sweep(name, "test", bodies[name].vector, heads[name], (0.0, 1.0))
        for name in tasks
    }
    added = total(bodies.values()).vector
    val: dict[float, dict[str, float]] = {coef: {} for coef in settings.coefs}
    for name in tasks:
        swept = study.sweep(name, "val", added, heads[name], settings.coefs)
        for coef, accuracy in swept.items():
            val[coef][name] = accuracy
    means = {coef: with_mean(scores) for coef, scores in val.items()}
    best = find_optimal_coef(means, MEAN)
    test = {n: study.sweep(n, "test", added, heads[n], (best,))[best] for n in tasks}
    return {
        "body0": with_mean({name: at[0.0] for name, at in ends.items()}),
        "single": with_mean({name: at[1.0] for name, at in ends.items()}),
        "val": {f"{coef:g}": scores for coef, scores in means.items()},
        "coefficient": best,
        "test": with_mean(test),
        "weights": study.vectors.hashes,
    }
