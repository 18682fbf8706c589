"""The study's results folder: tidy CSV, figures, settings, and a readme with the tables."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tangent_arithmetic.artificial_data import summary
from tangent_arithmetic.artificial_data.figures import draw
from tangent_arithmetic.artificial_data.presets import PRESETS, Preset
from tangent_arithmetic.run.provenance import git_commit, versions
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.atomic import atomic, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd


def write_report(folder: Path, name: str, tables: dict[str, pd.DataFrame], seconds: float) -> None:
    """Writes the tables as CSV, their figures, `study.json` and `README.md`.

    Args:
        folder: the results folder.
        name: the preset's name.
        tables: see `experiment.run`.
        seconds: duration of this run.
    """
    for table, content in tables.items():
        with atomic(folder / f"{table}.csv") as temporary:
            content.to_csv(temporary, index=False, float_format="%.6g")
    draw(tables, folder)
    seeds = tables["training"]["seed"].nunique()
    facts = {
        "preset": name,
        "settings": asdict(PRESETS[name]),
        "seeds": seeds,
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(),
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} cores",
        "seconds": round(seconds, 1),
    }
    write_json(folder / "study.json", facts)
    write_text(folder / "README.md", readme(name, PRESETS[name], tables, seeds))


def readme(name: str, preset: Preset, tables: dict[str, pd.DataFrame], seeds: int) -> str:
    """The readme of a results folder."""
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    head = "was trained along with the backbone, so each mode has its own"
    if preset.probe:
        head = "was trained on the frozen pre-trained backbone and stays as it is"
    data = "\n".join(
        f"- {label}: {spec.n_samples:,} rows, {spec.n_features} features ({spec.n_informative} "
        f"informative), {spec.n_classes} classes"
        for label, spec in preset.datasets.items()
    )
    parts = [
        f"# Artificial data, preset {name}\n\n"
        f"`python -m src.artificial_data.experiment --preset={name} --seeds={seeds}`: accuracies "
        f"in %, {over} (data, initialisation and order of batches). Settings, commit, versions and "
        f"seconds are in `study.json`, all numbers in the CSV files. What is seen is discussed in "
        f"`src/tangent_arithmetic/artificial_data/readme.md`.\n\n{data}\n\n"
        f"Each task's head {head}.",
        "## What was learnt\n\n" + markdown_table(
            ["model", "train", "val", "test", "guessing"], summary.training(tables)),
        "`pre-trained` is the base model's backbone under the task's head, `posthoc` the standard "
        "vector in the linearised backbone, `scratch` a model that did not start from the base "
        "model. All but `base` are means over tasks.",
        "## Four operations\n\n![](operations.png)\n\n" + markdown_table(
            ["v = theta_ft op theta_0; theta_0 + c v", "c = 0", "best", "at c", "c = 0.9",
             "rows not finite, %"], summary.operations(tables)),
        "`best` is the best test accuracy of the ten coefficients. A row whose logits are not "
        "finite counts as wrong. A quotient that is not finite, since theta_0 is (nearly) 0, is 0.",
        "## Sums\n\n![](sums.png)\n\n" + markdown_table(
            ["sum of", "pre-trained", "sum", "sum, normalised", "coefficient"],
            summary.sums(tables)),
        "Means over the tasks in a sum and, for two vectors, over all pairs. Coefficients are "
        "chosen on validation by the normalised accuracy: divided by that of each task's own model "
        "of the mode.",
        "## Negation\n\n![](negations.png)\n\n" + markdown_table(
            ["mode", "task, before", "task, negated", "control, before", "control, negated",
             "coefficient"], summary.negations(tables)),
        f"Control is the base model's own data set. On validation the coefficient with the lowest "
        f"accuracy of the task is chosen among those that keep {100 * summary.KEPT:g} % of the "
        "control's.",
        "## Interpolation\n\n![](interpolations.png)\n\n" + markdown_table(
            ["(1 - a) tau_1 + a tau_2", "own vector", "half of each", "other's vector"],
            summary.interpolations(tables)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"
