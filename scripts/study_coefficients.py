"""Solved coefficients beside other choices; writes coefficients.json and coefficients.md.

    python scripts/study_coefficients.py --seeds=0,1,2 --modes=linear,standard --sample=500
    python scripts/study_coefficients.py --sample=200  # 10 minutes on a core

For each seed of fine-tuning and each mode: zero-shot, the best coefficient for all, solved ones by
task, by layer and by both, on all validation pictures and on a few a class; aTLAS on the same
pictures; for linear modes also negation by layer beside one coefficient. Everything is chosen on
validation, accuracies are of test splits. aTLAS learns the same coefficients from the same stored
logits for linear modes; for others a coefficient for each tensor, through the network, at the last
of `--rates` alone. The published rate is 0.001, for more pictures and so more steps.

Rows of other modes and seeds that the file has are kept; they must be of the same `--sample`.

Seconds are those of the choice. For linear modes they come after a pass over the pictures, which
all choices share and which has a row of its own. Checkpoints must exist (`finetune`), those of a
seed in the folder that `--seed` picks. Other flags are those of `combine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tangent_arithmetic.arithmetic.coefficients import coefficients
from tangent_arithmetic.arithmetic.solving.atlas import Recipe, atlas
from tangent_arithmetic.arithmetic.solving.combining import (
    Combination,
    Settings,
    best_uniform,
    combine_linear,
    combine_standard,
    reductions,
)
from tangent_arithmetic.arithmetic.solving.groups import Direction, along, directions
from tangent_arithmetic.arithmetic.solving.merged import Merged
from tangent_arithmetic.arithmetic.solving.minibatches import (
    LabelledImages,
    NetworkImages,
    StoredImages,
)
from tangent_arithmetic.arithmetic.solving.negation import forget
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.shots import few, shot_indices
from tangent_arithmetic.arithmetic.solving.unlabelled import RULES
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import LinearEncoder, is_linear
from tangent_arithmetic.run.args import Parser, parse_arguments
from tangent_arithmetic.run.models import (
    base_encoder,
    checkpoint_hashes,
    split_of,
    task_vector,
    zeroshot_encoder,
)
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import spread
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.atomic import write_json, write_text
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.ranges import number, several
from tangent_arithmetic.storage.reading import read_json

T = TypeVar("T")
GRID = coefficients(21)
Row = dict[str, Any]  # "mean" over tasks, "test" by task, "control", "seconds", "facts"
Rows = dict[str, Row]
COLUMNS = ("mean", "control")


class Study:
    """The choices of a mode and a seed.

    Args:
        run: the run, whose checkpoints exist.
        shots: labelled pictures a class where there are few.
        rates: learning rates of aTLAS.
        blocks: whether a coefficient for each tensor of a standard model is solved for too.
    """

    def __init__(self, run: Run, shots: int, rates: Sequence[float], blocks: bool = False) -> None:
        self.run, self.shots, self.rates, self.blocks = run, shots, rates, blocks
        self.encoder, self.theta0_hash = zeroshot_encoder(run)
        self.taus = {
            task: task_vector(run, task, run.mode.name, self.encoder, self.theta0_hash).vector
            for task in run.tasks
        }
        self.base = base_encoder(self.encoder, run.mode.name)
        self.settings, self.rows = Settings(seed=run.seed), Rows()
        self.val, self.test = self.splits("Val"), self.splits("")

    def splits(self, end: str) -> list[Split]:
        """The validation ("Val") or test ("") splits of all tasks."""
        return [split_of(self.run, self.base, f"{task}{end}") for task in self.run.tasks]

    def parts(self, grouping: str) -> list[Direction]:
        """The directions of a grouping."""
        return directions(self.taus, grouping, list(self.encoder.weights()))

    def row(self, name: str, parts: Sequence[Direction], a: np.ndarray, test: Sequence[float],
            seconds: float, facts: Row | None = None) -> None:  # fmt: skip
        """Adds a choice with its accuracies on the test splits."""
        self.rows[name] = {
            "mean": float(np.mean(test)),
            "test": dict(zip(self.run.tasks, test, strict=True)),
            "seconds": seconds,
            "coefficients": {p.name: float(c) for p, c in zip(parts, a, strict=True)},
            "facts": facts or {},
        }

    def learned(
        self, images: LabelledImages, rates: Sequence[float], add: Callable[..., None]
    ) -> None:
        """Adds aTLAS at each of some learning rates."""
        for rate in rates:
            recipe = Recipe(rate=rate)
            found, seconds = timed(partial(atlas, images, recipe, self.run.seed))
            facts = {"epoch": found.epoch, "steps": found.steps, "val": max(found.accuracies)}
            add(f"aTLAS, rate {rate:g}", found.coefficients, seconds, facts)


def linear(study: Study, base: LinearEncoder) -> Rows:
    """The rows of a linear mode, from a pass over each split along the task-layer directions."""
    parts, run = study.parts("task-layer"), study.run
    reduced = partial(reductions, base, [part.vector for part in parts], folder=None)
    val, seconds = timed(partial(reduced, splits=study.val))
    test, ones = reduced(splits=study.test), np.ones(len(parts))

    def add(name: str, a: np.ndarray, seconds: float, facts: Row | None = None) -> None:
        study.row(name, parts, a, [split.accuracy(a) for split in test], seconds, facts)

    def uniform(name: str, splits: list[Reduced]) -> float:
        best, seconds = timed(
            lambda: max(GRID, key=lambda c: (np.mean([s.accuracy(c * ones) for s in splits]), -c))
        )
        add(name, best * ones, seconds, {"uniform": best})
        return best

    study.rows["pass over validation"] = {"seconds": seconds}
    add("zero-shot", 0 * ones, 0.0)
    best = uniform("uniform", val)
    for name, sums in groupings(parts).items():
        mixed = [split.along(sums) for split in val]
        found, seconds = timed(partial(combine_linear, mixed, best, study.settings))
        add(name, sums @ found.coefficients, seconds, found.facts)
    some = [split.take(shot_indices(split.labels, study.shots, run.seed)) for split in val]
    best = uniform(f"uniform, {study.shots} shots", some)
    found, seconds = timed(partial(combine_linear, some, best, study.settings))
    add(f"task-layer, {study.shots} shots", found.coefficients, seconds, found.facts)
    for rule in RULES:
        settings = replace(study.settings, rule=rule)
        found, seconds = timed(partial(combine_linear, val, best, settings))
        add(f"task-layer, no labels, {rule}", found.coefficients, seconds, found.facts)
    add("AdaMerging", found.others["AdaMerging"], 0.0)
    study.learned(StoredImages(val), study.rates, add)
    control = [split_of(run, base, f"{run.control}{end}") for end in ("Val", "")]
    study.rows |= negation(run, parts, val, test, reduced(splits=control))
    return study.rows


def groupings(parts: Sequence[Direction]) -> dict[str, np.ndarray]:
    """The task-layer directions (rows) that each coefficient of a grouping (columns) moves."""
    keys = {"task": [p.task for p in parts], "layer": [p.group for p in parts]}
    keys["task-layer"] = [p.name for p in parts]
    return {
        name: np.array([[float(key == other) for other in dict.fromkeys(own)] for key in own])
        for name, own in keys.items()
    }


def negation(
    run: Run,
    parts: Sequence[Direction],
    val: Sequence[Reduced],
    test: Sequence[Reduced],
    control: Sequence[Reduced],
) -> Rows:
    """Means over tasks of negation, by one coefficient and by layer.

    Args:
        run: the run.
        parts: the task-layer directions.
        val: the tasks' validation splits along them.
        test: their test splits.
        control: validation and test split of the control set.
    """
    rows: Rows = {"negation, one": {}, "negation, layer": {}}
    for task, own, held in zip(run.tasks, val, test, strict=True):
        kept = np.eye(len(parts))[:, [part.task == task for part in parts]]
        moved = [split.along(kept) for split in (own, control[0], held, control[1])]
        find = partial(forget, moved[0], moved[1], run.config.control_threshold)
        front, seconds = timed(find)
        for name, one in (("negation, one", True), ("negation, layer", False)):
            a = front.best(one=one).coefficients
            rows[name].setdefault("test", {})[task] = moved[2].accuracy(a)
            rows[name].setdefault("controls", {})[task] = moved[3].accuracy(a)
            rows[name]["seconds"] = rows[name].get("seconds", 0.0) + seconds
    for row in rows.values():
        row["mean"] = float(np.mean(list(row["test"].values())))
        row["control"] = float(np.mean(list(row["controls"].values())))
    return rows


def standard(study: Study) -> Rows:
    """The rows of a standard mode: all through the network."""

    def add(name: str, a: np.ndarray, seconds: float, facts: Row | None = None,
            grouping: str = "block") -> None:  # fmt: skip
        parts = study.parts(grouping)
        tau = along([part.vector for part in parts], a)
        moved = Merged(study.base, [tau], study.test)
        test = [split.accuracy(np.zeros(0)) for split in moved.logits(np.ones(1))]
        moved.place(np.zeros(1))
        study.row(name, parts, a, test, seconds, facts)

    def uniform(name: str, splits: Sequence[Split]) -> float:
        ones = np.ones(len(study.taus))
        tau = along(list(study.taus.values()), ones)
        best, seconds = timed(partial(best_uniform, study.base, tau, splits, GRID))
        add(name, best * ones, seconds, {"uniform": best}, "task")
        return best

    def solved(name: str, grouping: str, splits: Sequence[Split], best: float,
               settings: Settings = study.settings) -> None:  # fmt: skip
        vectors = [part.vector for part in study.parts(grouping)]
        model = Merged(study.base, vectors, splits)
        find: Callable[[], Combination] = partial(combine_standard, model, best, settings)
        found, seconds = timed(find)
        model.place(np.zeros(len(vectors)))
        add(name, found.coefficients, seconds, found.facts, grouping)

    add("zero-shot", np.zeros(len(study.taus)), 0.0, None, "task")
    best = uniform("uniform", study.val)
    for grouping in ("task", "layer", "task-layer", *(["block"] if study.blocks else [])):
        solved(grouping, grouping, study.val, best)
    for rule in RULES:
        settings = replace(study.settings, rule=rule)
        solved(f"task-layer, no labels, {rule}", "task-layer", study.val, best, settings)
    some = [few(split, study.shots, study.run.seed) for split in study.val]
    best = uniform(f"uniform, {study.shots} shots", some)
    solved(f"task-layer, {study.shots} shots", "task-layer", some, best)
    blocks = [part.vector for part in study.parts("block")]
    images = NetworkImages(Merged(study.base, blocks, study.val))
    study.learned(images, study.rates[-1:], add)
    return study.rows


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result of a function, and its seconds."""
    begin = time.monotonic()
    return work(), round(time.monotonic() - begin, 2)


def table(results: Mapping[str, Mapping[str, Rows]]) -> str:
    """A row a mode and a choice; mean and standard deviation over seeds."""
    lines = []
    for mode in dict.fromkeys(mode for seed in results.values() for mode in seed):
        for name in dict.fromkeys(n for seed in results.values() for n in seed.get(mode, {})):
            own = [seed[mode][name] for seed in results.values() if name in seed.get(mode, {})]
            cells = [spread([row[key] for row in own if key in row]) for key in COLUMNS]
            lines.append([mode, name, *cells, f"{np.mean([row['seconds'] for row in own]):.1f}"])
    return markdown_table(["mode", "coefficients", "test, %", "control, %", "seconds"], lines)


def studied(run: Run, *settings: Any) -> dict[str, Any]:
    """The rows of a mode and a seed, and where they come from; see `Study`."""
    begin, study = time.monotonic(), Study(run, *settings)
    base = study.base
    rows = linear(study, base) if is_linear(base) else standard(study)
    checkpoints = checkpoint_hashes(run, run.tasks, run.mode.name)
    facts = {"theta0_hash": study.theta0_hash, "checkpoints": checkpoints}
    return {"rows": rows, "provenance": provenance(run, time.monotonic() - begin, **facts)}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="seeds, N,...")
    parser.add_argument("--modes", default="linear,standard", help="comma list of modes")
    parser.add_argument("--few", type=number(int, 1, 10_000), default=4, help="pictures a class")
    parser.add_argument("--rates", type=several(float, 0, 1e3), default="0.001,0.01",
                        help="learning rates of aTLAS, N,...")  # fmt: skip
    parser.add_argument("--blocks", action="store_true", help="solve standard models by tensor too")
    own, flags = parser.parse_known_args(argv)
    setup_logging()
    first = Run.of(parse_arguments(flags))
    path = first.results.parent / "coefficients.json"
    results: dict[str, dict[str, Any]] = read_json(path)["seeds"] if path.exists() else {}
    check_sample(path, results, first.config.sample)
    for seed in own.seeds.split(","):
        results.setdefault(seed, {})
        flag = [] if seed == "0" else [f"--seed={seed}"]  # seed 0 is the default run's
        for mode in own.modes.split(","):
            words = [*flags, f"--finetuning-mode={mode}", *flag]
            run = Run.of(parse_arguments(words))
            results[seed][mode] = studied(run, own.few, own.rates, own.blocks)
            write(run, results)
    print(table(rows_of(results)))
    return 0


def check_sample(path: Path, results: Mapping[str, Mapping[str, Any]], sample: int | None) -> None:
    """Checks that the rows of a file are of the same sample, since means over seeds mix them.

    Raises:
        UsageError: if some are not.
    """
    for found in (found for own in results.values() for found in own.values()):
        other = found["provenance"]["config"].get("sample")
        if other != sample:
            raise UsageError(
                f"{path} has rows of {_sample(other)}, got {_sample(sample)}; delete it, or name "
                "another folder with --results"
            )


def _sample(sample: int | None) -> str:
    return "all pictures" if sample is None else f"--sample={sample}"


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Rows]]:
    """The rows alone: seed -> mode -> rows."""
    return {seed: {m: found["rows"] for m, found in own.items()} for seed, own in results.items()}


def write(run: Run, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what is there so far to the suite's results."""
    folder = run.results.parent
    write_json(folder / "coefficients.json", {"seeds": results})
    provenances = [found["provenance"] for own in results.values() for found in own.values()]
    sample = run.config.sample
    text = (
        f"# Solved coefficients: {run.suite.name}, {run.config.model}\n\n"
        "`python scripts/study_coefficients.py`: mean accuracy of the tasks' test splits, mean and "
        "standard deviation over seeds of fine-tuning; all is chosen on validation"
        f"{f', and {sample} pictures of each split are used' if sample else ''}. For negation the "
        "accuracy on the negated task, and on the control set. Seconds are those of the choice on "
        f"{provenances[0]['device']}, {torch.get_num_threads()} threads; those of linear modes "
        f"come after the pass.\n\n{table(rows_of(results))}\n"
    )
    write_text(folder / "coefficients.md", text)


if __name__ == "__main__":
    raise SystemExit(main())
