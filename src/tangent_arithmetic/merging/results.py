"""Results of merges, stored among the results of the run whose models were merged.

The file of a merge, `merging-<label>.json`, has the format of the task additions ("test",
"coefficient", "val", "provenance"), and in addition "merge", the label and the recipe.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_arithmetic.arithmetic.metrics import normalized
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.merging.stream import Merge
from tangent_arithmetic.merging.weights import Weights
from tangent_arithmetic.run.heads import evaluated_on
from tangent_arithmetic.run.models import command, stored_hash
from tangent_arithmetic.run.provenance import provenance
from tangent_arithmetic.run.results import (
    accuracies_path,
    check_targets,
    require_results,
    write_results,
)
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)
LONGEST = 120  # characters of a label in a file's name
# labels that the name of a file tells apart: no lists, and no signs but in numbers and words
PLAIN = re.compile(r"([\w.=+(), ]|(?<=[\w=])-(?=[\w.]))*")


@dataclass(frozen=True)
class Record:
    """The place of a merge among the results of a run.

    Attributes:
        run: the run.
        label: a description of the merge, the same for every seed.
        theta0_hash: the content hash of the run's pre-trained encoder.
    """

    run: Run
    label: str
    theta0_hash: str

    @property
    def path(self) -> Path:
        """The file."""
        slug = re.sub(r"[^\w.=+]+", "-", self.label).strip("-")
        if len(slug) > LONGEST or not PLAIN.fullmatch(self.label):
            slug = f"{slug[:LONGEST]}-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"
        return self.run.results / f"merging-{slug}.json"

    def check(self) -> None:
        """Checks that the file can be written; a `UsageError` if not."""
        check_targets(self.run, self.path)

    def write(self, merge: Merge, report: Mapping[str, Any]) -> None:
        """Writes the results of a merge from its report."""
        run, weights = self.run, merge.pool.weights
        hashes = {name: str(weights(name).facts["hash"]) for name in merge.pool.model_names}
        sets = {task: run.data.dataset(task) for task in run.tasks}
        mains = {task: "map" if sets[task].multilabel else "top1" for task in sets}
        test = {f"{task}:{mains[task]}": report[task]["accuracy"] for task in sets}
        test |= {"avg_top1": report["average"]["accuracy"]}
        results: dict[str, Any] = {"test": normalized(test, self._references(merge, hashes))}
        if chosen := report.get("scaling_factor"):
            metric = "avg_normalized_top1" if "normalised" in chosen["metric"] else "avg_top1"
            results["val"] = {coef: {metric: v} for coef, v in chosen["validation"].items()}
        if (name := merge.method.coefficient) is not None:
            results["coefficient"] = merge.options[name]
        results["merge"] = {"label": self.label, **report["merge"]}
        modes = modes_of(merge)
        results["provenance"] = provenance(
            run,
            sum(report["seconds"].values()),
            **({"mode": modes[0]} if len(modes) == 1 else {}),
            theta0_hash=self.theta0_hash,
            checkpoints=hashes,
            **evaluated_on(run, run.tasks),
        )
        write_results(self.path, results, run)
        logger.info("wrote %s", self.path)

    def _references(self, merge: Merge, hashes: Mapping[str, str]) -> dict[str, float]:
        """Accuracies of the single-task encoders; empty if they were not evaluated."""
        run, modes = self.run, modes_of(merge)
        if len(modes) > 1 or not set(run.tasks) <= hashes.keys():
            return {}
        (mode,) = modes
        used = {task: hashes[task] for task in run.tasks}
        try:
            path, made_by = accuracies_path(run, mode), command("eval_single_task", run, mode)
            singles = require_results(path, run, self.theta0_hash, made_by, used, run.tasks)
        except UsageError as error:
            logger.info("accuracies are not normalised: %s", error)
            return {}
        return {task: singles[task] for task in run.tasks}


def record_of(run: Run, merge: Merge, auto: bool) -> Record | None:
    """The place of a merge among the results of a run; None if its models are not of this run.

    Args:
        run: the run on whose tasks the merge is evaluated.
        merge: the merge.
        auto: whether the scaling factor is chosen on validation splits.
    """
    starts = {
        merge.pool.weights(name).facts.get("hash" if name == PRETRAINED else "theta0_hash")
        for name in merge.pool.models
    }
    theta0_hash = read_facts(run.zeroshot_path)["hash"] if run.zeroshot_path.is_file() else None
    models = {name: merge.pool.weights(name) for name in merge.pool.model_names}
    same_start = starts == {theta0_hash}
    own = same_start and all(_is_own(run, name, one) for name, one in models.items())
    if theta0_hash is None or not own:
        logger.info("not kept in %s: these are not models of %s", run.results, run.folder)
        return None
    return Record(run, label_of(run, merge, auto), theta0_hash)


def _is_own(run: Run, task: str, weights: Weights) -> bool:
    """Whether weights are those of a run's checkpoint of a task."""
    path = run.finetuned_path(task, _mode_of(weights))
    return stored_hash(path) == weights.facts.get("hash")


def label_of(run: Run, merge: Merge, auto: bool) -> str:
    """Method and plug-ins with their changed options; modes, tasks and precision unless usual."""
    options = merge.method.changed(merge.options)
    if auto:
        options = {**options, str(merge.method.coefficient): "auto"}
    parts = [_named(merge.method.name, options)]
    if merge.plugins:
        before = [_named(plugin.name, plugin.changed(own)) for plugin, own in merge.plugins]
        parts.append(f"after {'+'.join(before)}")
    if (modes := modes_of(merge)) != ["standard"]:
        parts.append(" and ".join(modes))
    tasks = list(run.suite.tasks)
    if merge.pool.model_names != tasks:
        parts.append(f"of {'+'.join(merge.pool.model_names)}")
    if run.tasks != tasks:
        parts.append(f"on {'+'.join(run.tasks)}")
    if run.config.precision != "fp32":
        parts.append(f"in {run.config.precision}")
    return ", ".join(parts)


def modes_of(merge: Merge) -> list[str]:
    """The fine-tuning modes of the models, as their files record them, such as "linear+taujp"."""
    models = map(merge.pool.weights, merge.pool.model_names)
    return list(dict.fromkeys(map(_mode_of, models)))


def _mode_of(weights: Weights) -> str:
    return str(weights.facts.get("mode", "linear" if weights.is_linear else "standard"))


def _named(name: str, options: Mapping[str, Any]) -> str:
    words = ", ".join(f"{option}={value}" for option, value in sorted(options.items()))
    return name + (f" ({words})" if words else "")
