"""Negation with solved coefficients: each task by itself, and the front against the control set."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tangent_arithmetic.arithmetic.solving.combining import Settings, accuracies, reductions
from tangent_arithmetic.arithmetic.solving.negation import Forgetting, forget
from tangent_arithmetic.arithmetic.solving.shots import few
from tangent_arithmetic.commands.combining.flags import named, parts_of, shots_of
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.run.models import (
    base_encoder,
    checkpoint_hashes,
    split_of,
    zeroshot_encoder,
)
from tangent_arithmetic.run.negation import origin_of
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.tables import markdown_table, percent

Results = dict[str, Any]


def negations(run: Run, settings: Settings) -> Results:
    """Every task's negation with solved coefficients, and the front, with provenance.

    Coefficients are solved and chosen on validation pictures of the task and the control set.
    """
    begin, mode, control = time.monotonic(), run.mode.name, run.control
    encoder, theta0_hash = zeroshot_encoder(run)
    base, shots = base_encoder(encoder, mode), shots_of(run.config)
    assert is_linear(base)
    results: Results = {}
    for task in run.tasks:
        parts = parts_of(run, encoder, theta0_hash, [task])
        vectors = [part.vector for part in parts]
        val = [few(split_of(run, base, f"{task}Val"), shots, run.seed)]
        val.append(split_of(run, base, f"{control}Val"))
        forgotten, kept = reductions(base, vectors, val, settings.folder)
        front = forget(forgotten, kept, run.config.control_threshold, bounds=settings.bounds)
        test = [split_of(run, base, name) for name in (task, control)]
        points = {"zeroshot": np.zeros(len(parts))}
        points |= {"uniform": front.best(one=True).coefficients}
        points |= {"solved": front.best().coefficients}
        results[task] = {
            "coefficients": named(parts, points["solved"]),
            "uniform": float(-points["uniform"][0]),
            "test": accuracies(base, vectors, points, test),
            "val": {"solved": _point(front.best()), "uniform": _point(front.best(one=True))},
            "least_control": front.least,
            "front": [_point(point) for point in front.frontier()],
        }
    results["provenance"] = provenance(
        run,
        time.monotonic() - begin,
        theta0_hash=theta0_hash,
        checkpoints=checkpoint_hashes(run, run.tasks, mode),
        **origin_of(run),
    )
    return results


def _point(point: Forgetting) -> dict[str, Any]:
    return {
        "task": point.task,
        "control": point.control,
        "weight": point.weight,
        "factor": point.factor,
    }


def negation_table(run: Run, results: Results) -> str:
    """Each task and the control set: zero-shot, one coefficient, solved ones."""
    kinds = ("zeroshot", "uniform", "solved")
    rows = [
        [results[task]["test"][kind][name] for kind in kinds for name in (task, run.control)]
        for task in run.tasks
    ]
    means = list(np.mean(rows, axis=0))
    header = [f"{kind}{end}" for kind in ("zero-shot", "one", "solved") for end in ("", " control")]
    cells = [[t, *map(percent, row)] for t, row in zip(run.tasks, rows, strict=True)]
    return markdown_table(["%", *header], [*cells, ["mean", *map(percent, means)]])
