"""Compares compressions of task vectors on the embedded suite: accuracy against bits.

    python scripts/study_compressions.py --seeds=3

Writes results/embedded/compressions.{json,md}. Encoders are those of `finetune.py` (made where they
are missing). Each task is evaluated with the model that its compression gives back, so that the
task of an image must be known: these numbers do not compare with those of merged models
(`study_merging.py`). The lambda of each TALL mask is chosen on validation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_merging import Row, accuracies, options, publish, runs

from tangent_arithmetic.data.suites import EMBEDDED_MODEL, get_suite
from tangent_arithmetic.merging.compressed import Compressed, Reconstruction
from tangent_arithmetic.merging.pool import ModelPool, run_pool
from tangent_arithmetic.merging.taskpools import SuiteTaskPool
from tangent_arithmetic.run.summary import spread
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.logs import setup_logging

logger = logging.getLogger(__name__)
FLOAT = 32  # bits of a weight of the encoders
LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)  # of TALL masks, as in the paper
# label -> compression, options
COMPRESSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tall_masks": ("tall_masks", {}),
    "emr": ("emr", {}),
    "tsv_c": ("tsv_c", {}),
    "bitdelta": ("bitdelta", {}),
    **{f"quantised (b={bits})": ("quantised", {"bits": bits}) for bits in (8, 4, 3, 2, 1)},
}


def accuracy(
    pool: ModelPool, tasks: SuiteTaskPool, task: str, rebuilt: Reconstruction, validation: bool
) -> float:
    """The accuracy of a task's rebuilt encoder."""
    encoder = tasks.encoder(pool, rebuilt.state)
    return tasks.measure(encoder, task, {}, [1.0], validation)[0]["accuracy"]


def chosen_lambda(pool: ModelPool, tasks: SuiteTaskPool, task: str) -> float:
    """The lambda with the best accuracy on validation; the smallest of several."""
    found = {
        value: accuracy(
            pool,
            tasks,
            task,
            Compressed(pool, "tall_masks", tall_mask_lambda=value).reconstruct(task),
            validation=True,
        )
        for value in LAMBDAS
    }
    return max(found, key=lambda value: (found[value], -value))


def study(run: Path) -> dict[str, Row]:
    """All compressions of one run: accuracies by task, and bits."""
    names = list(get_suite("embedded").tasks)
    pool, tasks = run_pool(run, names), SuiteTaskPool(EMBEDDED_MODEL, str(run), names)
    weights = sum(value.numel() for value in pool.base.outline.values())
    single = accuracies(pool, tasks, "test")

    def row(top1: dict[str, float], bits: dict[str, int], shared: int, **facts: Any) -> Row:
        sizes: Row = {"bits": bits, "shared_bits": shared, "weights": weights}
        return {"top1": top1, "own": single["own"], **sizes, **facts}

    rows = {
        "zero-shot": row(single["zero-shot"], dict.fromkeys(names, 0), 0),
        "own encoders": row(single["own"], dict.fromkeys(names, FLOAT * weights), 0),
    }
    for label, (name, settings) in COMPRESSIONS.items():
        given = dict(settings)
        if name == "tall_masks":
            given["tall_mask_lambda"] = [chosen_lambda(pool, tasks, task) for task in names]
        compressed = Compressed(pool, name, **given)
        top1, bits, shared = {}, {}, 0
        for task in names:
            rebuilt = compressed.reconstruct(task)
            top1[task] = accuracy(pool, tasks, task, rebuilt, validation=False)
            bits[task], shared = rebuilt.bits, rebuilt.shared
        rows[label] = row(top1, bits, shared, options=given)
        logger.info("%s, %s: %.1f", run, label, 100 * np.mean(list(top1.values())))
    return rows


def summarize(seeds: Mapping[int, Mapping[str, Row]]) -> list[list[str]]:
    """A line per compression: accuracy, normalised accuracy, and bits a weight and task.

    The bits are those of each task, those shared by all, and both together by task.
    """
    lines = []
    for label in next(iter(seeds.values())):
        rows = [by_label[label] for by_label in seeds.values()]
        absolute = [float(np.mean(list(row["top1"].values()))) for row in rows]
        relative = [
            float(np.mean([row["top1"][t] / row["own"][t] for t in row["own"]])) for row in rows
        ]
        own = [np.mean(list(row["bits"].values())) / row["weights"] for row in rows]
        shared = [row["shared_bits"] / row["weights"] for row in rows]
        every = [a + b / len(row["bits"]) for a, b, row in zip(own, shared, rows, strict=True)]
        sizes = [f"{np.mean(values):.2f}" for values in (own, shared, every)]
        lines.append([label, spread(absolute), spread(relative), *sizes])
    return lines


def write(folder: Path, results: Mapping[int, Mapping[str, Row]], seconds: float) -> str:
    """Writes the results so far and returns the table."""
    header = [
        "compression",
        "accuracy, %",
        "normalised, %",
        "own bits",
        "shared bits",
        "bits a task",
    ]
    table = markdown_table(header, summarize(results))
    text = (
        "# Compressed task vectors on the embedded suite\n\n"
        f"`python scripts/study_compressions.py --seeds={len(results)}`: mean test accuracy of the "
        "eight tasks, each with the encoder that its compression gives back, absolute and divided "
        "by that of the task's own encoder; mean and standard deviation over fine-tuning seeds. "
        "Bits are for each weight of the encoder: those that every task stores, those stored once "
        "for all tasks, and the sum with the latter divided by eight. The pre-trained encoder, 32 "
        "bits a weight, is not counted. The task of an image must be known, which merged models "
        f"do not need.\n\n{table}\n"
    )
    publish(folder / "compressions", text, results, seconds)
    return table


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = options(__doc__, argv)
    setup_logging()
    begun, results, table = time.monotonic(), {}, ""
    for seed, run in runs(args.seeds, ("standard",)):
        results[seed] = study(run)
        table = write(args.results / "embedded", results, time.monotonic() - begun)
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
