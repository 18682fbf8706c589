"""Accuracy against images, seconds and operations of fine-tuning; draws figures/fast.

    python scripts/study_methods.py --test --finetuning-mode=linear --grid=recipe=papers,fast \
        --seeds=0,1,2 --output=results/embedded/fast.json
    python scripts/study_fast.py

Reads the rows that `study_methods.py` has written, of any recipes and of both modes, and measures
what an image of a training step costs at each batch size: seconds, standard and linear in turns
(median), optimizer and averaging included, and floating-point operations: those of a forward pass,
as PyTorch counts them, three times for a standard step and five times for a linear one. Loading
images is not part of it. Writes the costs to fast_cost.json beside the rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from tangent_arithmetic.analysis.figures import legend_below, panels, plain, save
from tangent_arithmetic.data.loading import SeededPictures
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.run.args import Parser, parse_arguments
from tangent_arithmetic.run.models import base_encoder, classification_head, zeroshot_encoder
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.provenance import git_commit, versions
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.storage.reading import read_json
from tangent_arithmetic.training.averaging import TailMean
from tangent_arithmetic.training.objectives import CrossEntropy
from tangent_arithmetic.training.optimizers import OPTIMIZERS

Row = Mapping[str, Any]
Cost = dict[str, dict[str, dict[str, float]]]  # mode -> batch size -> seconds, operations an image
PASSES = {"standard": 3, "linear": 5}  # forward passes that a step is worth, at least
AXES = {"images": "training images", "seconds": "seconds", "operations": "operations"}


def stepper(run: Run, mode: str, batch: int) -> Callable[[], object]:
    """A training step of a mode on random images, with its optimizer and the mean of iterates."""
    encoder, _ = zeroshot_encoder(run)
    task = run.tasks[0]
    model = ImageClassifier(base_encoder(encoder, mode), classification_head(run, task))
    model.freeze_head()
    recipe = run.recipe(task)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[recipe.optimizer](parameters, recipe)
    average, objective = TailMean(parameters, 1.0, 10**6), CrossEntropy()
    images = torch.stack([example(run, encoder)] * batch)
    labels = torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        objective.loss(model, (images, labels), 0).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(1)

    return step


def operations(run: Run) -> float:
    """Floating-point operations of a forward pass of the encoder, an image."""
    encoder, _ = zeroshot_encoder(run)
    images = example(run, encoder)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(images)
    return float(counter.get_total_flops())


def example(run: Run, encoder: ModuleEncoder) -> torch.Tensor:
    """An image of the first task."""
    pictures = run.data.dataset(f"{run.tasks[0]}Val").train
    image: torch.Tensor = SeededPictures(pictures, encoder.train_preprocess)[0][0]
    return image


def costs(run: Run, batches: Sequence[int], rounds: int) -> Cost:
    """Seconds and operations an image, of both modes at each batch size."""
    found: Cost = {mode: {} for mode in PASSES}
    forward = operations(run)
    for batch in batches:
        steps = {mode: stepper(run, mode, batch) for mode in PASSES}
        times: dict[str, list[float]] = {mode: [] for mode in PASSES}
        for mode, step in steps.items():
            step()
            found[mode][str(batch)] = {"operations": PASSES[mode] * forward}
        for _ in range(rounds):
            for mode, step in steps.items():
                begin = time.perf_counter()
                step()
                times[mode].append(time.perf_counter() - begin)
        for mode, own in times.items():
            found[mode][str(batch)]["seconds"] = statistics.median(own) / batch
    return found


def batch_size(run: Run, row: Row) -> int:
    """The images of an optimizer step of a row."""
    config = row["provenance"]["config"]
    recipe = run.with_(**{n: config[n] for n in ("recipe", "batch_size")}).recipe(run.tasks[0])
    return recipe.batch_size * recipe.num_grad_accumulation


def curve(rows: Sequence[Row], cost: Cost, mode: str, against: str) -> np.ndarray:
    """Points (cost, mean accuracy, deviation over seeds, 1 for the papers' recipe) of a mode."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["provenance"]["mode"] == mode:
            groups.setdefault(row["label"], []).append(row)
    points = []
    for label, group in groups.items():
        batch = str(group[0]["batch"])
        each = 1.0 if against == "images" else cost[mode][batch][against]
        accuracies = [100 * row["single"] for row in group]
        deviation = np.std(accuracies, ddof=1) if len(group) > 1 else 0.0
        point = (each * group[0]["images"], np.mean(accuracies), deviation, "papers" in label)
        points.append(point)
    return np.array(sorted(points), dtype=np.float64).reshape(-1, 4)


def draw(rows: Sequence[Row], cost: Cost) -> Any:
    """Three panels: accuracy of single tasks against images, seconds and operations."""
    figure, (axes,) = panels(1, len(AXES), 3.0, 2.6, sharey=True)
    for axis, (against, title) in zip(axes, AXES.items(), strict=True):
        for mode in PASSES:
            points, colour = curve(rows, cost, mode, against), MODES[mode].colour
            fast, papers = points[points[:, 3] == 0], points[points[:, 3] == 1]
            options = {"color": colour, "marker": MODES[mode].marker}
            axis.errorbar(*fast[:, :3].T, label=f"{MODES[mode].label}, averaged", **options)
            options["markerfacecolor"] = "none"
            name = f"{MODES[mode].label}, papers' recipe"
            axis.errorbar(*papers[:, :3].T, linestyle="none", label=name, **options)
        axis.set_xlabel(title)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_ylabel("test accuracy of single tasks, %")
    legend_below(figure, axes[len(axes) // 2], 2)
    return figure


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Measures and draws."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="file of study_methods.py (default: fast.json)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each mode and batch size")
    own, flags = parser.parse_known_args(argv)
    setup_logging()
    run = Run.of(parse_arguments([*flags, "--finetuning-mode=linear"]))
    folder = run.results.parent
    rows = read_json(own.rows or folder / "fast.json")["rows"]
    rows = [{**row, "batch": batch_size(run, row)} for row in rows if "single" in row]
    cost = costs(run, sorted({row["batch"] for row in rows}), own.rounds)
    threads = torch.get_num_threads()
    facts = {"device": str(run.device), "threads": threads, "rounds": own.rounds}
    facts |= {"commit": git_commit(), "versions": versions()}
    write_json(folder / "fast_cost.json", {"an image": cost, "provenance": facts})
    save(
        plain(draw, rows, cost), folder / "figures", "fast", f"{run.suite.name}, {threads} threads"
    )
    for mode, own_cost in cost.items():
        for batch, each in own_cost.items():
            told = f"{1e3 * each['seconds']:.2f} ms, {each['operations'] / 1e6:.0f} Mflop an image"
            print(f"{mode}, batch {batch}: {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
