"""All results below a folder as one tidy table, for plots and statistics of your own.

>>> from tangent_arithmetic import load_results
>>> table = load_results("results")  # doctest: +SKIP
>>> sums = table.query("method == 'addition' and split == 'test' and coefficient > 0")
... # doctest: +SKIP
>>> sums.query("metric == 'top1'").pivot_table(index="mode", columns="task", values="value")
... # doctest: +SKIP
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tangent_arithmetic.arithmetic.metrics import MAINS
from tangent_arithmetic.run import results
from tangent_arithmetic.run.modes import Mode
from tangent_arithmetic.run.present import kind_of
from tangent_arithmetic.runtime.atomic import PART, files_below
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

COLUMNS = (
    *("suite", "model", "seed", "mode", "method", "split"),
    *("task", "coefficient", "metric", "value"),
)
MEAN = "mean"  # the task of a mean over the tasks
FOLDER = re.compile(r"(?P<model>.+?)(_seed(?P<seed>\d+))?(?P<sample>_sample\d+)?")


class _Value(NamedTuple):
    """A row of the table without the columns that a whole file shares."""

    method: str
    split: str
    task: str
    coefficient: float | None
    metric: str
    value: float


def load_results(folder: str | Path) -> pd.DataFrame:
    """Every accuracy in a root of results, a suite's folder or one run's folder.

    Files of `combine`, whose points have many coefficients, are left out.
    Damaged files, and damaged parts of files, are left out with a warning.

    Args:
        folder: the folder; files of results are found at any depth.

    Returns:
        A row a value, with the columns `COLUMNS`: "method" is "single", "addition", "negation",
        "addition A+B" for a sum of some of the suite's tasks, or "merging LABEL"; "split" is
        "validation" or "test"; "task" is a data set, the negated task, or "mean"; "coefficient"
        scales the task vectors, subtracted in negations (NaN where a merge has none); "metric" is
        "top1", "normalized_top1", ..., with the prefix "control_" for the control set of a
        negation; "value" is a fraction, not percent.

    Raises:
        MissingFileError: if there is no such folder.
        UsageError: if no file of results is in it.
    """
    import pandas as pd

    root = Path(folder)
    if not root.is_dir():
        raise MissingFileError(f"expected a folder of results, found none at {root}")
    rows: list[tuple[Any, ...]] = []
    for path in sorted(files_below(root, ".json")):
        complete = not path.parent.name.endswith(PART)
        if complete and (kind := _kind_of(path)) is not None:
            rows += _rows(path, *kind)
    if not rows:
        raise UsageError(
            f"expected results such as zeroshot_accuracies.json in {root} or below, found none. "
            "Make them with: tangent-arithmetic evaluate --finetuning-mode=none"
        )
    return pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(ignore_index=True)


def _kind_of(path: Path) -> tuple[Mode | None, str] | None:
    """The mode and the method of a file of results; None for other files."""
    return (None, "merging") if path.stem.startswith("merging-") else kind_of(path)


def _rows(path: Path, mode: Mode | None, method: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a file."""
    try:
        found = results.load_results(path)
    except UsageError as error:
        logger.warning("%s is left out: %s", path, error)
        return
    origin = found.pop("provenance", {})
    if mode is None:
        merge = found.pop("merge", {})
        merge = merge if isinstance(merge, Mapping) else {}
        method = f"merging {merge.get('label') or path.stem.removeprefix('merging-')}"
    values = {"single": _single, "negation": _negations}.get(method.partition(" ")[0], _sums)
    named = str(origin.get("mode", "")) if mode is None else mode.name
    shared = (*_place(path, origin), named)
    for value in values(found, method, mode):
        yield (*shared, *value)


def _place(path: Path, origin: Mapping[str, Any]) -> tuple[str, str, int]:
    """The suite, model and seed of a file, from its provenance or else from its folders."""
    match = FOLDER.fullmatch(path.parent.name)
    assert match is not None  # any name matches
    model, seed = origin.get("model"), origin.get("seed")
    return (
        origin.get("suite") or path.parent.parent.name,
        f"{model or match['model']}{match['sample'] or ''}",
        int(match["seed"] or 0) if seed is None else seed,
    )


def _single(found: Mapping[str, Any], method: str, mode: Mode | None) -> Iterator[_Value]:
    """Accuracies of single-task models, at coefficient 1, or of the pre-trained one."""
    coef = 1.0 if mode is not None and mode.edits else 0.0
    for key, value in found.items():
        name, _, metric = key.partition(":")
        default = "map" if f"{name}:map" in found else "top1"
        yield _Value(method, *_split_of(name), coef, metric or default, value)


def _sums(found: Mapping[str, Any], method: str, mode: Mode | None) -> Iterator[_Value]:
    """Sums and merges: the sweep on validation; the chosen one, zero-shot and 1 on test."""
    for coef, metrics in found.get("val", {}).items():
        yield from _metrics(metrics, method, "validation", float(coef))
    yield from _metrics(found.get("zeroshot", {}), method, "test", 0.0)
    yield from _metrics(found.get("test", {}), method, "test", found.get("coefficient"))
    yield from _metrics(found.get("test_at_1", {}), method, "test", 1.0)


def _metrics(
    metrics: Mapping[str, Any], method: str, split: str, coef: float | None
) -> Iterator[_Value]:
    for key, value in metrics.items():
        name, colon, metric = key.rpartition(":")
        if colon:
            yield _Value(method, *_split_of(name), coef, metric, value)
        else:
            yield _Value(method, split, MEAN, coef, key.removeprefix("avg_"), value)


def _negations(found: Mapping[str, Any], method: str, mode: Mode | None) -> Iterator[_Value]:
    """Negations: the sweep on validation, and the chosen model and zero-shot on test."""
    for task, record in found.items():
        if not isinstance(record, Mapping):
            continue
        for coef, metrics in record.get("val", {}).items():
            for key, value in metrics.items():
                name, colon, metric = key.rpartition(":")
                control = colon and name.removesuffix("Val") != task
                metric = f"control_{metric}" if control else metric
                yield _Value(method, "validation", task, float(coef), metric, value)
        for prefix, end in (("", ""), ("control_", "_control")):
            metric = f"{prefix}{_main_of(record, task, bool(prefix))}"
            for key, coef in (("zeroshot", 0.0), ("test", record.get("coefficient"))):
                if (value := record.get(f"{key}{end}")) is not None:
                    yield _Value(method, "test", task, coef, metric, value)


def _main_of(record: Mapping[str, Any], task: str, control: bool) -> str:
    """The main metric of a negated task, or of its control set, by the sweep on validation."""
    found = (key.rpartition(":") for metrics in record.get("val", {}).values() for key in metrics)
    names = {metric for name, colon, metric in found if colon and (name != f"{task}Val") == control}
    return next((main for main in MAINS if main in names), MAINS[0])


def _split_of(name: str) -> tuple[str, str]:
    """The split and the task of X or XVal."""
    return "validation" if name.endswith("Val") else "test", name.removesuffix("Val")
