"""Chooses the settings of a method on validation, and reports the chosen ones on test.

    python scripts/study_methods.py --finetuning-mode=linear+taujp --grid=penalty=1,10
    python scripts/study_methods.py --finetuning-mode=linear+taujp --penalty=10 --seeds=0,1,2 --test

Fine-tunes every task for each point of the grid (checkpoints that exist are used), and prints a row
a point: accuracy of the single tasks, of the sum of all task vectors at its best coefficient and at
1, and of the negations with the control set at 95 % of its accuracy. Coefficients are always chosen
on validation; without --test so are all figures, and test splits are not read. Images (steps times
batch) and seconds are those of training all tasks. Standard models are evaluated at fewer
coefficients, each of which takes a pass, and are not negated. Other flags are those of
src/finetune.py. --joint trains one model of all tasks instead, on the same images. --start copies
a folder of checkpoints before a point is trained, such as those of DELTA's teachers; {seed} stands
for the seed. --output adds the rows to a JSON file, with provenance, in place of those of the same
settings and seed, and writes the means over seeds of all that are in it beside it, in markdown.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tangent_arithmetic.arithmetic.features import Features, linear_features
from tangent_arithmetic.arithmetic.interference import means, of_features
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.solving.groups import along
from tangent_arithmetic.commands.finetune import finetune
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.run.args import Config, Parser, parse_arguments
from tangent_arithmetic.run.models import (
    base_encoder,
    classification_head,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.objectives import method_of
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import spread
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.atomic import check_writable, write_json, write_text
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.training.loop import TrainingData, train
from tangent_arithmetic.training.objectives import Objective
from tangent_arithmetic.training.recipe import Recipe

SUMS = np.round(np.arange(0, 1.5001, 0.05), 2)  # the published grid goes to 1
STANDARD_SUMS = np.round(np.arange(0, 1.0001, 0.1), 2)
NEGATIONS = np.round(np.arange(0, 6.0001, 0.05), 2)
COLUMNS = (
    "single",
    "best",
    "normalised",
    "coefficient",
    "at 1",
    "worst",
    "target",
    "control",
    "xi",
    "images",
    "seconds",
)
# flags beside a method's settings that decide numbers, and settings that follow from a seed
FLAGS = (
    *("model", "suite", "tasks", "control_dataset", "head", "template", "finetuning_mode"),
    *("recipe", "target", "patience", "sample", "control_threshold"),
    *(one.name for one in fields(Recipe)),
)
OF_A_SEED = ("teacher_hash",)
# columns that are no percentages, and their digits
PLAIN = {"coefficient": 2, "xi": 4, "images": 0, "seconds": 0}
HEADER = ["", "single", "sum", "norm.", "coef", "at 1", "worst gain", "negated", "control",
          "interference", "images", "seconds"]  # fmt: skip


class Together(Dataset[tuple[Any, int]]):
    """The training images of all tasks, as often as their recipes have epochs, with all classes.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        sets = [run.data.dataset(f"{task}Val") for task in run.tasks]
        self.ends = np.cumsum([0, *(len(data.classnames) for data in sets)])
        repeats = [run.recipe(task).epochs for task in run.tasks]
        self.items = [
            (data.train, index, int(begin))
            for data, begin, count in zip(sets, self.ends[:-1], repeats, strict=True)
            for index in list(range(len(data.train))) * count
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pictures, inner, begin = self.items[index]
        image, label = pictures[inner]
        return image, begin + int(label)


@dataclass
class Masked(Objective):
    """Cross-entropy over the classes of an image's own task.

    Attributes:
        ends: the first class of each task, and the number of classes.
    """

    ends: np.ndarray

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        """The loss of each image."""
        images, labels = batch
        edges = torch.as_tensor(self.ends[1:], device=labels.device)
        own = torch.bucketize(torch.arange(int(edges[-1]), device=labels.device), edges, right=True)
        others = own[None] != own[labels][:, None]
        logits = model(images).masked_fill(others, -torch.inf)
        return F.cross_entropy(logits, labels, reduction="none")


def joint(run: Run, split: str) -> dict[str, Any]:
    """One model of all tasks, trained on what the single ones are: the sum's upper bound."""
    encoder, _ = zeroshot_encoder(run)
    tuned = base_encoder(encoder, run.mode.name)
    heads, images = [classification_head(run, task) for task in run.tasks], Together(run)
    weights, biases = (torch.cat([getattr(h, n) for h in heads]) for n in ("weight", "bias"))
    classifier = ImageClassifier(tuned, ClassificationHead(heads[0].normalize, weights, biases))
    classifier.freeze_head()
    data = TrainingData(images, tuned.train_preprocess, run.num_workers)
    recipe = replace(run.recipe(run.tasks[0]), epochs=1)
    facts = train(classifier, data, recipe, objective=Masked(images.ends), seed=run.seed)
    metrics = [split_of(run, tuned, f"{task}{split}").accuracy(tuned) for task in run.tasks]
    alone = {task: main_of(found) for task, found in zip(run.tasks, metrics, strict=True)}
    cost = {"images": len(images), "seconds": facts["seconds"]}
    return {"at 1": float(np.mean(list(alone.values()))), "tasks": alone, **cost}


class Study:
    """The figures of one trained set of task vectors.

    Args:
        run: the run, whose checkpoints exist.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.tasks, self.control = run, run.tasks, run.control
        encoder, theta0_hash = zeroshot_encoder(run)
        vectors = (task_vector(run, t, run.mode.name, encoder, theta0_hash) for t in self.tasks)
        self.vectors = [vector.vector for vector in vectors]
        self.base = base_encoder(encoder, run.mode.name)
        self.sums = SUMS if is_linear(self.base) else STANDARD_SUMS
        self._features = dict[str, Features]()

    def features(self, name: str) -> Features:
        """f0 and J tau of every task vector on a split, read or computed once."""
        if name not in self._features:
            assert is_linear(self.base)
            split = split_of(self.run, self.base, name)
            facts = (split.batches, split.compute, split.cache)
            self._features[name] = linear_features(self.base, self.vectors, *facts)
        return self._features[name]

    @torch.no_grad()
    def curve(
        self, name: str, signs: dict[str, float], coefs: Sequence[float] | np.ndarray
    ) -> np.ndarray:
        """Accuracy along a signed sum of task vectors."""
        if not is_linear(self.base):
            own = [v for t, v in zip(self.tasks, self.vectors, strict=True) if t in signs]
            tau = along(own, np.array([signs[t] for t in self.tasks if t in signs]))
            return np.array(split_of(self.run, self.base, name).sweep(self.base, tau, list(coefs)))
        features, head = self.features(name), classification_head(self.run, name)
        direction = sum(
            (
                signs[t] * d
                for t, d in zip(self.tasks, features.directions, strict=True)
                if t in signs
            ),
            torch.zeros(()),
        )
        return np.array([_accuracy(head(features.f0 + c * direction), features) for c in coefs])

    def figures(self, split: str) -> dict[str, Any]:
        """All figures on a split, "Val" or "" for test; coefficients are those of validation."""
        every = dict.fromkeys(self.tasks, 1.0)
        single_val = {t: self.curve(f"{t}Val", {t: 1.0}, [1.0])[0] for t in self.tasks}
        on_val = {t: self.curve(f"{t}Val", every, self.sums) for t in self.tasks}
        normalised = np.mean([on_val[t] / single_val[t] for t in self.tasks], axis=0)
        best = int(normalised.argmax())
        single = {t: self.curve(f"{t}{split}", {t: 1.0}, [1.0])[0] for t in self.tasks}
        ends = [0.0, self.sums[best], 1.0]
        sums = {t: self.curve(f"{t}{split}", every, ends) for t in self.tasks}
        zeroshot, at_best, at_one = np.array([sums[t] for t in self.tasks]).T
        alone = np.array([single[t] for t in self.tasks])
        tasks = {
            t: {"zeroshot": z, "single": s, "best": b, "at 1": o}
            for t, z, s, b, o in zip(self.tasks, zeroshot, alone, at_best, at_one, strict=True)
        }
        return {
            "zeroshot": zeroshot.mean(),
            "single": alone.mean(),
            "best": at_best.mean(),
            "normalised": (at_best / alone).mean(),
            "coefficient": float(self.sums[best]),
            "at 1": at_one.mean(),
            "worst": (at_best - zeroshot).min(),
            **(self.linear_figures(split, tasks) if is_linear(self.base) else {}),
            "tasks": tasks,
        }

    def linear_figures(self, split: str, tasks: dict[str, dict[str, float]]
    ) -> dict[str, float | None]:  # fmt: skip
        """Means of negation, whose figures are added to each task's, and interference."""
        negations = {t: self.negation(t, split) for t in self.tasks}
        for task, found in negations.items():
            tasks[task] |= found
        xi = {t: of_features(self.features(f"{t}{split}")) for t in self.tasks}
        told = means({t: dict(zip(self.tasks, row, strict=True)) for t, row in xi.items()})
        names = ("target", "control", "control zeroshot")
        negated = {n: float(np.mean([own[n] for own in negations.values()])) for n in names}
        return {**negated, "xi": told.off, "xi own": told.on}

    def negation(self, task: str, split: str) -> dict[str, float]:
        """Target and control accuracy at the coefficient chosen on validation."""
        signs = {task: -1.0}
        target = self.curve(f"{task}Val", signs, NEGATIONS)
        control = self.curve(f"{self.control}Val", signs, NEGATIONS)
        threshold = self.run.config.control_threshold
        allowed = np.flatnonzero(control >= threshold * control[0])
        coef = NEGATIONS[min(allowed, key=lambda i: (target[i], i))]
        return {
            "target": self.curve(f"{task}{split}", signs, [coef])[0],
            "control": self.curve(f"{self.control}{split}", signs, [coef])[0],
            "control zeroshot": self.curve(f"{self.control}{split}", signs, [0.0])[0],
            "negated at": float(coef),
        }


def _accuracy(logits: Tensor, features: Features) -> float:
    return float((logits.argmax(1) == features.labels).double().mean())


def row(label: str, found: dict[str, Any]) -> list[str]:
    """A row of the table, in percent."""
    return [label, *(cell([found[c]] if found.get(c) is not None else [], c) for c in COLUMNS)]


def cell(values: Sequence[float], column: str) -> str:
    """The mean of values, and their deviation if there are several; "-" if there are none."""
    scale, digits = (1, PLAIN[column]) if column in PLAIN else (100, 1)
    return spread(values, scale, digits)


def cost(run: Run) -> dict[str, float]:
    """Images and seconds of training all tasks, as their checkpoints record them."""
    infos = [read_facts(run.finetuned_path(task, run.mode.name))["info"] for task in run.tasks]
    sizes = [i["recipe"]["batch_size"] * i["recipe"]["num_grad_accumulation"] for i in infos]
    images = sum(size * info["steps"] for size, info in zip(sizes, infos, strict=True))
    return {"images": images, "seconds": sum(info["seconds"] for info in infos)}


def settings_of(record: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """What the seeds of a row have in common: settings, and further flags that decide numbers."""
    config, default = record["provenance"]["config"], Config()
    flags = {name: config.get(name, getattr(default, name)) for name in FLAGS}
    settings = {**flags, **record["settings"]}
    return frozenset((n, str(v)) for n, v in settings.items() if n not in OF_A_SEED)


def added(records: Sequence[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with one more, in place of an earlier one of the same settings and seed."""

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return one["label"], one["split"], one["seed"], settings_of(one)

    return [*(one for one in records if key(one) != key(record)), record]


def over_seeds(records: Sequence[dict[str, Any]]) -> str:
    """A table of all records: mean and standard deviation over the seeds of equal settings.

    Rows of one label name those of their settings that differ.
    """
    groups = dict[tuple[str, frozenset[tuple[str, str]]], list[dict[str, Any]]]()
    for record in records:
        others = record["settings"].get("others")
        seen = f", others {' '.join(others)}" if others else ""
        label = f"{record['label']}{seen} ({record['split']})"
        groups.setdefault((label, settings_of(record)), []).append(record)
    lines = []
    for (label, own), group in groups.items():
        shared = frozenset.intersection(*(other for same, other in groups if same == label))
        differing = (f"{n} {v}" for n, v in sorted(own - shared) if v != "None")
        name = ", ".join([label, *differing])
        values = ([record[c] for record in group if record.get(c) is not None] for c in COLUMNS)
        cells = (cell(own, column) for own, column in zip(values, COLUMNS, strict=True))
        lines.append([name, str(len(group)), *cells])
    return markdown_table([HEADER[0], "seeds", *HEADER[1:]], lines)


def points(grids: Sequence[str]) -> list[dict[str, str]]:
    """The points of a grid of NAME=VALUE,..., each a value by flag."""
    axes = [(name, values.split(",")) for name, _, values in (g.partition("=") for g in grids)]
    return [
        dict(zip([name for name, _ in axes], chosen, strict=True))
        for chosen in itertools.product(*(values for _, values in axes))
    ]


def measured(run: Run, test: bool, together: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Figures of what is fine-tuned where it is missing; if on test, those on validation too."""
    if together:
        return joint(run, "" if test else "Val"), None
    for task in run.tasks:
        finetune(run, task)
    study = Study(run)
    on_val = study.figures("Val")
    found = study.figures("") if test else on_val
    return {**found, **cost(run)}, on_val if test else None


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes, evaluates, prints the table and writes the results."""
    parser = Parser(description=__doc__)
    parser.add_argument("--grid", action="append", default=[], help="FLAG=VALUE,... to try")
    parser.add_argument("--seeds", default="0", help="seeds, N,...")
    parser.add_argument("--test", action="store_true", help="report on the test splits")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/study"))
    parser.add_argument("--joint", action="store_true", help="one model of all tasks instead")
    parser.add_argument("--start", help="checkpoints to begin with, with {seed}")
    parser.add_argument("--label", default="", help="name of the rows")
    parser.add_argument("--output", type=Path, help="JSON file to add the rows to")
    own, flags = parser.parse_known_args(argv)
    setup_logging()
    if own.output:
        check_writable(own.output)
    rows: list[list[str]] = []
    for point, seed in itertools.product(points(own.grid), own.seeds.split(",")):
        begun, words = time.monotonic(), [f"--{name}={value}" for name, value in point.items()]
        run = Run.of(parse_arguments([*flags, *words, f"--seed={seed}"]))
        if start := own.start and own.start.format(seed=seed):
            run = run.with_(save=start)
        settings = {**method_of(run, run.tasks[0]), **point, "others": run.config.others}
        name = "_".join(f"{n}={v}" for n, v in settings.items() if v is not None) or "plain"
        name = name.replace("/", "-").replace(" ", "")
        place = own.folder / f"seed{seed}" / name
        if start and not place.exists():
            shutil.copytree(start, place)
        run = run.with_(save=str(place))
        found, on_val = measured(run, own.test, own.joint)
        name = own.label or run.mode.label + ", joint training" * own.joint
        label = ", ".join([name, *(f"{n} {v}" for n, v in point.items())])
        rows.append(row(f"{label}, seed {seed}", found))
        print(markdown_table(HEADER, rows), flush=True)
        if own.output:
            record = {"label": label, "seed": int(seed), "split": "test" if own.test else "val"}
            record |= {"settings": settings, **found, "validation": on_val}
            record["provenance"] = provenance(run, time.monotonic() - begun)
            old = read_json(own.output)["rows"] if own.output.is_file() else []
            records = added(old, record)
            write_json(own.output, {"rows": records})
            write_text(own.output.with_suffix(".md"), f"{over_seeds(records)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
