"""How the texts of a source become a training and a test part of equal classes.

The rule needs no random generator: a document is tested on if the SHA-256 of its name says so, one
in five, so that no two sentences of a review lie on both sides; then the larger class of each part
loses the texts whose own SHA-256 is largest, so that chance is one over the number of classes.
Of a long text the beginning is kept, so that the suite runs on a laptop.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tangent_arithmetic.data.splitting import PART
from tangent_arithmetic.runtime.atomic import write_text

BEGINNING = 256  # characters of a text, at most


class Row(NamedTuple):
    """A text of a source.

    Attributes:
        document: the name of what it is a part of; parts of one are not separated.
        text: the text.
        label: its class.
        split: "train" or "test" if the source says so; "" to follow from the document.
    """

    document: str
    text: str
    label: int
    split: str = ""


def parts(rows: Iterable[Row], most: Mapping[str, int]) -> list[Row]:
    """The rows with their splits, each text once, with equally many of each class in a split.

    Args:
        rows: of the source; of equal texts the first is kept.
        most: texts of a class in a split, at most, by split.
    """
    rows, seen = list(rows), set[str]()
    labels = sorted({row.label for row in rows})
    groups = {split: {label: list[Row]() for label in labels} for split in most}
    for row in rows:
        text = " ".join(row.text.split())[:BEGINNING].strip()
        if not text or text.casefold() in seen:
            continue
        seen.add(text.casefold())
        split = row.split or ("test" if _digest(row.document)[0] % PART == 0 else "train")
        groups[split][row.label].append(row._replace(text=text, split=split))
    return [
        row
        for split, classes in groups.items()
        for row in _balanced(list(classes.values()), most[split])
    ]


def _balanced(classes: Sequence[list[Row]], most: int) -> list[Row]:
    """Equally many texts of each class, in the order of their digests."""
    count = min(most, *map(len, classes))
    drawn = [sorted(rows, key=lambda row: _digest(row.text))[:count] for rows in classes]
    return sorted((row for rows in drawn for row in rows), key=lambda row: _digest(row.text))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write_table(path: Path, rows: Sequence[Row], classes: Sequence[str]) -> None:
    """Writes rows as a table with the columns text, label and split; a label is a class's number.

    Args:
        path: the CSV file.
        rows: with splits.
        classes: names of the classes.
    """
    width = len(str(len(classes) - 1))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("text", "label", "split"))
    writer.writerows((row.text, f"{row.label:0{width}}", row.split) for row in rows)
    write_text(path, buffer.getvalue())
