"""Rows of the hub's data sets: from the hub, or without a network from a folder.

In the folder, `glue/cola` or `civil_comments` is a download of the repository (parquet files named
by their split) or a data set that the library `datasets` has saved.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.data.hub import load_rows
from tangent_arithmetic.data.registry import held_out
from tangent_arithmetic.language.tasks import Task
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import readable

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

NONE = -1  # the label of a row that has none


def read_split(repo: str, config: str | None, split: str, folder: Path | None) -> Dataset:
    """The rows of one split.

    Args:
        repo: the repository, ORG/NAME.
        config: its configuration; None for the only one.
        split: the split's name.
        folder: where to look, instead of the hub.

    Raises:
        MissingFileError: if it is not there, or the hub cannot be reached.
    """
    if folder is None:
        rows: Dataset = load_rows(repo, repo, config, split)
        return rows
    place = folder / repo.rpartition("/")[2]
    places = [place / config, place] if config else [place]
    for each in places:
        if (found := _saved(each, split)) is not None:
            return found
    for each in [p for root in places for p in (root, root / "data", root / "default")]:
        if files := sorted([*each.glob(f"{split}.parquet"), *each.glob(f"{split}-*.parquet")]):
            return _parquet(files)
    raise MissingFileError(
        f"{places[0]} has no split {split}; expected {split}-*.parquet there, as in the repository "
        f"{repo} of the hub, or a DatasetDict written by save_to_disk"
    )


def _saved(place: Path, split: str) -> Dataset | None:
    """The split of a data set that `datasets` has saved; None if there is none."""
    from datasets import load_from_disk

    if not any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return None
    with readable(place, "a data set written by save_to_disk"):
        found: Any = load_from_disk(place)
    if hasattr(found, "features"):  # one split, for training if it has no name
        return found if str(found.split or "train") == split else None
    return found.get(split)


def _parquet(files: list[Path]) -> Dataset:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    tables = []
    for file in files:
        with readable(file, "a parquet file; fetch it again"):
            tables.append(parquet.read_table(file))
    return Dataset(pyarrow.concat_tables(tables))


def column(rows: Dataset, name: str, what: str) -> list[Any]:
    """The values of a column.

    Raises:
        UsageError: if there is no such column.
    """
    if name not in rows.column_names:
        raise UsageError(
            f"{what} has no column {name!r}; expected it among {', '.join(rows.column_names)}"
        )
    return list(rows[name])


def labels_of(name: str, task: Task, rows: Dataset) -> list[int] | list[float]:
    """The label of each row: a number of a class, -1 for none; or a score, NaN for none.

    Classes are matched by name where the rows have names.

    Raises:
        UsageError: if they cannot be matched, or no row has a label.
    """
    from datasets import ClassLabel

    values, feature = column(rows, task.label, name), rows.features[task.label]
    if task.is_score:
        return [math.nan if value is None else float(value) for value in values]
    numbers = {theirs.casefold(): number for number, theirs in enumerate(task.classes)}
    known: list[Any] = list(range(len(task.classes)))
    if isinstance(feature, ClassLabel):
        known = [theirs.casefold() for theirs in feature.names]
        values = [known[v] if v is not None and 0 <= v < len(known) else NONE for v in values]
    elif any(isinstance(value, str) for value in values):
        values = [NONE if v in ("", "-", None) else v.casefold() for v in values]
    else:
        numbers = {str(number): number for number in known}
        whole = [int(v) if isinstance(v, bool | float) and v in known else v for v in values]
        values = [NONE if v in (None, NONE) else str(v) for v in whole]
    if strange := sorted({str(v) for v in values if v != NONE} - numbers.keys()):
        raise UsageError(
            f"{name}: {task.repo} has the labels {', '.join(map(shown, strange[:5]))}, expected "
            f"{', '.join(task.classes)}"
        )
    labels = [NONE if value == NONE else numbers[value] for value in values]
    if all(label == NONE for label in labels):
        raise UsageError(f"{name}: no row of this split of {task.repo} has a label")
    return labels


def labelled(
    name: str, split: str, task: Task, folder: Path | None, most: int | None = None
) -> tuple[Dataset, list[Any]]:
    """The labelled rows of "train", "val" or "test", and their labels.

    "val" is a tenth of the training split, at most 5,000 rows, see `data.registry.hold_out`;
    "train" is the rest.

    Args:
        name: of the task, for messages.
        split: train, val or test.
        task: the task.
        folder: where to look, instead of the hub.
        most: rows to keep, the first ones; None for all.
    """
    rows = read_split(task.repo, task.config, task.test if split == "test" else "train", folder)
    labels = labels_of(name, task, rows)
    kept = [i for i, v in enumerate(labels) if not (math.isnan(v) if task.is_score else v == NONE)]
    if len(kept) < len(labels):
        logger.info("%s: %d rows without a label are left out", name, len(labels) - len(kept))
    if split != "test":
        train, val = held_out(len(kept))
        kept = [kept[i] for i in (val if split == "val" else train)]
    kept = kept[:most]
    if not kept:
        raise UsageError(f"{name}: expected labelled rows in the split {split}, got none")
    return rows.select(kept), [labels[i] for i in kept]
