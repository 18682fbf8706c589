"""Measures the criteria of the embedded suite for a recipe or other pre-trained weights.

    python scripts/study_embedded.py --lr=2e-4 --epochs=2 --save=checkpoints/study
    python scripts/study_embedded.py --model=ViT-Nano-8__pretrained__FILE --save=checkpoints/other

Fine-tunes every task in both modes, skipping existing checkpoints, and prints, for standard, linear
and post-hoc models, accuracy of the single tasks, of the sums of all pairs and of all task vectors,
and of the negations. Only validation splits are read, so that choices can be made here. With --test
coefficients still come from validation, but accuracies from test: for the end. Flags are those of
the scripts in src/; --output=FILE sets the path of the JSON file.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.features import Features, linear_features
from tangent_arithmetic.commands.finetune import finetune
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.run.args import Parser, parse_arguments
from tangent_arithmetic.run.models import (
    base_encoder,
    classification_head,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging

MODES: tuple[str, ...] = ("standard", "linear", "posthoc")
Signs = dict[str, float]  # task -> factor of its task vector, before the coefficient
Measure = Callable[[Signs, str, Sequence[float]], list[float]]  # top-1 at each coefficient


def measure_of(run: Run, mode: str) -> Measure:
    """A function that returns accuracies on a data set along a signed sum of task vectors.

    Linear models need one pass over a data set for all sums, since their features are affine.
    """
    encoder, theta0_hash = zeroshot_encoder(run)
    vectors = {t: task_vector(run, t, mode, encoder, theta0_hash) for t in run.tasks}
    base = base_encoder(encoder, mode)

    def standard(signs: Signs, name: str, coefs: Sequence[float]) -> list[float]:
        total = functools.reduce(operator.add, (vectors[t] * sign for t, sign in signs.items()))
        return split_of(run, base, name).sweep(base, total.vector, coefs)

    @functools.cache
    def features(name: str) -> Features:
        assert isinstance(base, LinearizedImageEncoder)
        split = split_of(run, base, name)
        taus = [tau.vector for tau in vectors.values()]
        return linear_features(base, taus, split.batches, split.compute, split.cache)

    @torch.no_grad()
    def linear(signs: Signs, name: str, coefs: Sequence[float]) -> list[float]:
        head, split, accuracies = classification_head(run, name), features(name), []
        for coef in coefs:
            logits = head(split.at([coef * signs.get(task, 0.0) for task in vectors]))
            accuracies.append(float((logits.argmax(1) == split.labels).float().mean()))
        return accuracies

    return standard if mode == "standard" else linear


class Study:
    """Results of one mode, with coefficients chosen on validation.

    Args:
        run: the run.
        mode: "standard", "linear" or "posthoc".
        split: suffix of the data sets to report on, "Val" or "" for test.
    """

    def __init__(self, run: Run, mode: str, split: str = "Val") -> None:
        self.tasks, self.control, self.split = run.tasks, run.control, split
        self.coefs = coefficients(run.config.n_eval_points)
        self.threshold = run.config.control_threshold
        self.measure = measure_of(run, mode)
        ends = {t: self.measure({t: 1.0}, f"{t}Val", (0.0, 1.0)) for t in self.tasks}
        self.val_singles = {task: single for task, (_, single) in ends.items()}

    def report(self, signs: Signs, name: str, coef: float) -> float:
        """Accuracy on the split to report on."""
        return self.measure(signs, f"{name}{self.split}", [coef])[0]

    def addition(self, tasks: Sequence[str]) -> tuple[dict[str, float], float]:
        """Accuracies of the sum, at the coefficient with the best mean normalised one."""
        signs = dict.fromkeys(tasks, 1.0)
        normalised = [
            np.asarray(self.measure(signs, f"{task}Val", self.coefs)) / self.val_singles[task]
            for task in tasks
        ]
        coef = self.coefs[int(np.mean(normalised, axis=0).argmax())]
        return {task: self.report(signs, task, coef) for task in tasks}, coef

    def negation(self, task: str) -> dict[str, float]:
        """Target accuracy, control accuracy as a share of zero-shot, and the coefficient."""
        signs = {task: -1.0}
        target = self.measure(signs, f"{task}Val", self.coefs)
        kept = np.asarray(self.measure(signs, f"{self.control}Val", self.coefs))
        allowed = np.flatnonzero(kept >= self.threshold * kept[0])
        coef = self.coefs[min(allowed, key=lambda i: (target[i], i))]
        share = self.report(signs, self.control, coef) / self.report(signs, self.control, 0.0)
        return {"target": self.report(signs, task, coef), "control": share, "coefficient": coef}

    def figures(self, with_pairs: bool = True) -> dict[str, Any]:
        """All results; accuracies in [0, 1]."""
        first = self.tasks[0]
        zeroshot = {task: self.report({task: 1.0}, task, 0.0) for task in self.tasks}
        added, coef = self.addition(self.tasks)
        pairs = {}
        for pair in itertools.combinations(self.tasks, 2) if with_pairs else ():
            accuracies, _ = self.addition(pair)
            pairs["+".join(pair)] = float(np.mean([accuracies[t] - zeroshot[t] for t in pair]))
        return {
            "zeroshot": zeroshot,
            "zeroshot control": self.report({first: 1.0}, self.control, 0.0),
            "single": {task: self.report({task: 1.0}, task, 1.0) for task in self.tasks},
            "sum of all": added,
            "coefficient": coef,
            "pairs": pairs,
            "negation": {task: self.negation(task) for task in self.tasks},
        }


def table(results: dict[str, Any], tasks: Sequence[str]) -> str:
    """The results of all modes in points, as changes from zero-shot accuracy."""
    first: dict[str, Any] = next(iter(results.values()))
    zeroshot = {task: first["zeroshot"][task] for task in tasks}

    def row(label: str, values: dict[str, float], note: str = "") -> list[str]:
        mean = float(np.mean(list(values.values())))
        return [label, *(f"{100 * v:.1f}" for v in (*values.values(), mean)), note]

    def gains(values: dict[str, float]) -> dict[str, float]:
        return {task: values[task] - zeroshot[task] for task in tasks}

    def of_pairs(pairs: dict[str, float], task: str) -> float:
        return float(np.mean([gain for pair, gain in pairs.items() if task in pair.split("+")]))

    rows = [row("zero-shot", zeroshot, f"control {100 * first['zeroshot control']:.1f}")]
    rows += [row(f"{mode}, one task", gains(one["single"])) for mode, one in results.items()]
    for mode, one in results.items():
        rows.append(row(f"{mode}, all", gains(one["sum of all"]), f"coef {one['coefficient']}"))
    for mode, one in results.items():
        if one["pairs"]:
            rows.append(row(f"{mode}, pairs", {t: of_pairs(one["pairs"], t) for t in tasks}))
    for mode, one in results.items():
        lost = gains({task: one["negation"][task]["target"] for task in tasks})
        kept = 100 * float(np.mean([one["negation"][task]["control"] for task in tasks]))
        rows.append(row(f"{mode}, negated", lost, f"control at {kept:.1f} % of zero-shot"))
    return markdown_table(["points", *tasks, "mean", ""], rows)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, evaluates, prints the table and writes the results."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--test", action="store_true", help="report on the test splits")
    parser.add_argument("--no-pairs", action="store_true", help="leave out the sums of pairs")
    own, flags = parser.parse_known_args(argv)
    run = Run.of(parse_arguments(flags))
    setup_logging()
    path = own.output or run.folder / "study.json"
    check_writable(path)
    results: dict[str, Any] = {}
    start = time.monotonic()
    for mode in MODES:
        if mode != "posthoc":
            for task in run.tasks:
                finetune(run.with_(finetuning_mode=mode), task)
        results[mode] = Study(run, mode, "" if own.test else "Val").figures(not own.no_pairs)
    print(table(results, run.tasks))
    seconds = time.monotonic() - start
    write_json(path, {**results, "provenance": provenance(run, seconds)})
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
