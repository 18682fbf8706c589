"""Results of merges beside published ones of the same method, model and number of tasks.

Published results are mean absolute top-1 accuracies of OpenAI's CLIP on the 8, 14 and 20 tasks of
arXiv:2405.07813, in percent, from `assets/published.csv`; each row names its checkpoints, the rule
of its coefficient and its source. Papers on merging differ in these more than their methods do, see
docs/published-numbers.md.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tangent_arithmetic.merging.methods import METHODS
from tangent_arithmetic.merging.registry import PRETRAINED
from tangent_arithmetic.run.tables import markdown_table
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import read_json

# names of published models -> ours
TOWERS = {"base-patch32": "ViT-B-32", "base-patch16": "ViT-B-16", "large-patch14": "ViT-L-14"}
PLACE = re.compile(
    r"(?P<owner>[\w.-]+)/clip-vit-(?P<tower>base-patch32|base-patch16|large-patch14)"
)
OWNERS = {"tanganke": "FusionBench"}  # whose checkpoints are whose
ON_VALIDATION, UNKNOWN = "on validation", "not stated"


@dataclass(frozen=True)
class Measured:
    """The result of a merge, or a published one.

    Attributes:
        method: the merging method.
        model: the name of the model.
        tasks: the number of tasks.
        checkpoints: whose checkpoints were merged, or `UNKNOWN`.
        accuracy: mean absolute top-1 accuracy, in percent.
        coefficient: its value, or how it was chosen; "none" without one.
        source: where it was read.
        settings: what a merge has beside the method's defaults and one model a task, for a list.
    """

    method: str
    model: str
    tasks: int
    checkpoints: str
    accuracy: float
    coefficient: str
    source: str
    settings: tuple[str, ...] = ()


def published() -> list[Measured]:
    """All published results."""
    file = resources.files("tangent_arithmetic.merging").joinpath("assets", "published.csv")
    lines = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return [
        Measured(
            line["method"],
            line["model"],
            int(line["tasks"]),
            line["checkpoints"],
            float(line["absolute"]),
            line["coefficient"],
            line["source"],
        )
        for line in lines
    ]


def measured(
    path: str | Path, model: str | None = None, checkpoints: str | None = None
) -> Measured:
    """The result in a report of `merge`, or in a file `merging-*.json` of a run's results.

    Args:
        path: the file.
        model: the name of the model, if the file does not tell.
        checkpoints: whose checkpoints they are, likewise.

    Raises:
        UsageError: if it holds no evaluated merge, or the model is not known.
    """
    content = read_json(path)
    recipe: Any = content.get("merge")
    recipe = recipe if isinstance(recipe, Mapping) else {}
    models = recipe["models"] if isinstance(recipe.get("models"), Mapping) else {}
    found = _accuracy(content)
    if not models or found is None or recipe.get("method") not in METHODS:
        raise UsageError(
            f"{path} is no report of an evaluated merge; expected one that merge wrote with a "
            "taskpool and report_save_path=FILE, or a results file merging-*.json"
        )
    places = [str(facts.get("place", "")) for facts in models.values()]
    matches = {name: PLACE.search(place) for name, place in zip(models, places, strict=True)}
    base, others = matches.get(PRETRAINED), [m for n, m in matches.items() if n != PRETRAINED]
    named = content.get("provenance", {}).get("model")
    model = model or named or (TOWERS[base["tower"]] if base else None)
    if model is None:
        raise UsageError(f"{path} does not tell the model; name it with --model")
    owners = {OWNERS.get(match["owner"], UNKNOWN) if match else UNKNOWN for match in others}
    owner = owners.pop() if len(owners) == 1 else UNKNOWN
    accuracy, tasks = found
    return Measured(
        recipe["method"],
        str(model).removesuffix("-quickgelu"),
        tasks,
        checkpoints or owner,
        100 * accuracy,
        _coefficient(content),
        str(path),
        tuple(_settings(recipe, len(others), tasks)),
    )


def _settings(recipe: Mapping[str, Any], models: int, tasks: int) -> Iterator[str]:
    """What is not the method with its defaults on one model a task."""
    if models != tasks:
        yield f"models ({models})"
    if plugins := recipe.get("plugins"):
        yield f"plug-ins ({', '.join(shown(name) for each in plugins for name in each)})"
    method = METHODS[recipe["method"]]
    known = {name: v for name, v in recipe["options"].items() if name in method.defaults}
    changed = {n: v for n, v in method.changed(known).items() if n != method.coefficient}
    if changed:
        yield f"options ({', '.join(f'{name}={shown(v)}' for name, v in changed.items())})"


def _accuracy(content: Mapping[str, Any]) -> tuple[float, int] | None:
    """The mean accuracy and the number of tasks."""
    if isinstance(average := content.get("average"), Mapping) and "accuracy" in average:
        rows = [row for row in content.values() if isinstance(row, Mapping) and "accuracy" in row]
        return float(average["accuracy"]), len(rows) - 1
    test = content.get("test")
    if isinstance(test, Mapping) and "avg_top1" in test:
        tasks = {name.partition(":")[0] for name in test if name.endswith(":top1")}
        return float(test["avg_top1"]), len(tasks)
    return None


def _coefficient(content: Mapping[str, Any]) -> str:
    recipe = content["merge"]
    name = METHODS[recipe["method"]].coefficient
    if METHODS[recipe["method"]].needs_data and name is None:
        return f"on {recipe['options'].get('split', 'validation')} images"
    if name is None:
        return "none"
    value = f"{recipe['options'].get(name)}"
    chosen = "scaling_factor" in content or "val" in content
    return f"{value} {ON_VALIDATION}" if chosen else value


def differences(own: Measured, other: Measured) -> str:
    """What differs beside the number: checkpoints, the rule of the coefficient, and settings."""
    parts = []
    if own.checkpoints != other.checkpoints:
        parts.append(f"checkpoints ({own.checkpoints})")
    rule = ON_VALIDATION if own.coefficient.endswith(ON_VALIDATION) else own.coefficient
    same = rule == other.coefficient or _number(rule) == _number(other.coefficient) is not None
    if not same:
        parts.append(f"coefficient ({own.coefficient})")
    parts += own.settings
    return ", ".join(parts) or "nothing known"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def comparable(own: Measured, others: Sequence[Measured]) -> Iterator[Measured]:
    """Published results of the same method, model and number of tasks, same checkpoints first."""
    same = [
        other
        for other in others
        if (other.method, other.model, other.tasks) == (own.method, own.model, own.tasks)
    ]
    yield from sorted(same, key=lambda other: other.checkpoints != own.checkpoints)


def comparison(results: Sequence[Measured]) -> str:
    """A table of results beside what is published, in Markdown."""
    header = ["method", "model", "tasks", "ours, %", "published, %", "deviation"]
    header += ["their checkpoints", "their coefficient", "differs (ours)", "source"]
    rows, known = [], published()
    for own in results:
        label = [shown(own.method), shown(own.model), str(own.tasks), f"{own.accuracy:.1f}"]
        beside = list(comparable(own, known))
        if not beside:
            rows.append([*label, "-", "-", "-", "-", "nothing published is known", "-"])
        for other in beside:
            cells = [f"{other.accuracy:g}", f"{own.accuracy - other.accuracy:+.1f}"]
            cells += [other.checkpoints, other.coefficient, differences(own, other), other.source]
            rows.append([*label, *cells])
    return markdown_table(header, rows)
