"""Own data in a table: a CSV, TSV, Parquet or JSON-lines file of image paths, or texts, and labels.

Columns are found by name (`data.columns`) or named in the source. Relative paths are relative to
the table. A column of splits is optional; one that is found, but has no split's name, is ignored. A
cell such as `cat|dog` has several labels: the data set is then a multi-label one.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tangent_arithmetic.data.base import Pictures, Splits
from tangent_arithmetic.data.columns import known_columns
from tangent_arithmetic.data.files import ListedPictures, require_files
from tangent_arithmetic.data.own.folders import split_names
from tangent_arithmetic.data.own.words import Names, named, untrained
from tangent_arithmetic.data.pictures import read_rgb
from tangent_arithmetic.data.splitting import with_test_part
from tangent_arithmetic.data.texts import Texts
from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.reading import read_text, readable

if TYPE_CHECKING:
    import pandas as pd

SEPARATOR, TAB = "|", "\t"  # between the labels of one example; between cells
_WHAT = {"image": "image (or text)"}
logger = logging.getLogger(__name__)

INTEGER, INTEGRAL = re.compile(r"-?\d+"), re.compile(r"-?\d+(\.0*)?")
LONGEST_CELL = 10**9  # characters
QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class LabelledFiles:
    """Images in files with several labels each.

    Attributes:
        paths: the files.
        targets: uint8 (images, classes), 1 where an image has the label.
        root: the folder of the table.
    """

    paths: tuple[str, ...]
    targets: np.ndarray
    root: Path

    @property
    def samples(self) -> list[tuple[str, str]]:
        """Path and labels of each image, the labels as a text: its identity."""
        labels = ("|".join(map(str, np.flatnonzero(row))) for row in self.targets)
        return list(zip(self.paths, labels, strict=True))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        return read_rgb(self.paths[index]), self.targets[index]


@dataclass(frozen=True)
class _Rows:
    """The rows of a table: an image's path or a text, labels and a split for each.

    Attributes:
        kind: image or text.
        items: paths or texts.
        labels: of each.
        splits: train, val or test of each.
        classes: all labels, in the order of their numbers.
        multilabel: whether one has several labels.
        texts: the column of texts that a table has beside one of images, which nobody named.
    """

    kind: str
    items: list[str]
    labels: list[tuple[str, ...]]
    splits: list[str]
    classes: list[str]
    multilabel: bool
    texts: str = ""

    def of(self, split: str) -> _Rows:
        """The rows of a split."""
        kept = [i for i, name in enumerate(self.splits) if name == split]
        items, labels = [self.items[i] for i in kept], [self.labels[i] for i in kept]
        return replace(self, items=items, labels=labels, splits=[split] * len(kept))

    def examples(self, table: Path) -> Pictures:
        """The images or texts."""
        targets = self._targets()
        if self.kind == "text":
            return Texts(tuple(self.items), targets, str(table))
        if self.multilabel:
            return LabelledFiles(tuple(self.items), targets, table.parent)
        samples = list(zip(self.items, targets.tolist(), strict=True))
        return ListedPictures(samples, self.classes, table.parent)

    def _targets(self) -> np.ndarray:
        """The labels: int64 (rows,), or uint8 (rows, classes)."""
        numbers = {label: number for number, label in enumerate(self.classes)}
        if not self.multilabel:
            return np.array([numbers[label] for (label,) in self.labels], dtype=np.int64)
        targets = np.zeros((len(self.items), len(self.classes)), np.uint8)
        for row, labelled in enumerate(self.labels):
            targets[row, [numbers[label] for label in labelled]] = 1
        return targets


@dataclass(frozen=True)
class TableSource:
    """A data set in a table.

    Attributes:
        name: the data set, for messages.
        path: the table.
        columns: names of the columns "image" or "text", "label" and "split"; found if not given.
            An empty name of "split" is for none.
        names: class names, see `words.named`; None for those of the table.
        multilabel: whether images have several labels; None if a cell with `|` says so.
    """

    name: str
    path: Path
    columns: tuple[tuple[str, str], ...] = ()
    names: Names = None
    multilabel: bool | None = None

    def classnames(self, location: Path) -> tuple[str, ...]:
        """The class names; opens no image."""
        return named(self.name, self._rows().classes, self.names)

    def __call__(self, location: Path) -> Splits:
        """Reads the table and checks that its images exist.

        Raises:
            MissingFileError: if the table or an image does not exist.
            UsageError: if the table cannot be read, or a column or a cell is missing.
        """
        rows = self._rows()
        if rows.kind == "image":
            place = f"{self.name}={self.path.name}?text={rows.texts}"
            remedy = f"; for the texts in the column {shown(rows.texts)} write {place}"
            require_files(rows.items, self.path, self.name, remedy if rows.texts else "")
        parts = {split: rows.of(split) for split in dict.fromkeys(rows.splits)}
        read = {split: part.examples(self.path) for split, part in parts.items()}
        train, test, val = read["train"], read.get("test", read["train"]), read.get("val")
        names = named(self.name, rows.classes, self.names)
        splits = Splits(train, test, names, val, "table", rows.multilabel)
        if "test" in read:
            return splits
        whole = parts["train"]
        strata = [None if rows.multilabel else labels for labels in whole.labels]
        if rows.kind == "text":
            return with_test_part(self.name, splits, strata)
        keys = [_below(path, self.path.parent) for path in whole.items]
        return with_test_part(self.name, splits, strata, keys)

    def _rows(self) -> _Rows:
        table = read_table(self.path)
        kind = self._kind(list(table))
        columns = {each: self._column(each, list(table)) for each in (kind, "label")}
        cells = {
            each: texts_of(self.path, table, column, lists=each == "label")
            for each, column in columns.items()
        }
        multilabel = self.multilabel
        if multilabel is None:
            multilabel = any(SEPARATOR in cell for cell in cells["label"])
        for each in (kind,) if multilabel else (kind, "label"):
            if empty := [row for row, cell in enumerate(cells[each], 1) if not cell]:
                raise UsageError(
                    f"data set {self.name}: {self.path} has no {each} in row {empty[0]} (column "
                    f"{shown(columns[each])}; {len(empty)} such rows); fill it, or remove the row"
                )
        labels = [_labels(cell) if multilabel else (cell,) for cell in cells["label"]]
        if all(INTEGRAL.fullmatch(label) for cell in labels for label in cell):  # 1.0 is 1
            labels = [tuple(label.partition(".")[0] for label in cell) for cell in labels]
        classes = _in_order({label for cell in labels for label in cell})
        if not classes:
            raise UsageError(f"data set {self.name}: {self.path} has no rows with a label")
        items = self._paths(cells[kind]) if kind == "image" else cells[kind]
        splits = self._splits(table)
        trained = {
            label
            for cell, split in zip(labels, splits, strict=True)
            for label in cell
            if split == "train"
        }
        extra = [name for name in classes if name not in trained]
        if extra and multilabel:
            logger.warning(
                "%s: no training row has the labels %s",
                self.name,
                ", ".join(map(shown, extra[:10])),
            )
        elif extra:
            remedy = "remove them, or add training rows"
            raise untrained(self.name, self.path, "the training rows", extra, remedy)
        named = "image" in dict(self.columns)
        texts = [] if kind == "text" or named else known_columns("text", list(table))
        return _Rows(kind, items, labels, splits, classes, multilabel, (*texts, "")[0])

    def _kind(self, names: list[str]) -> str:
        """Whether the table lists images or texts: by the column named, or found, images first."""
        named = [each for each in ("image", "text") if each in dict(self.columns)]
        if len(named) == 2:
            raise UsageError(
                f"data set {self.name}: image and text columns are both named; expected one of them"
            )
        found = [each for each in ("image", "text") if known_columns(each, names)]
        return (named or found or ["image"])[0]

    def _paths(self, cells: Sequence[str]) -> list[str]:
        """The paths of the images, which are relative to the table; refuses repeated ones."""
        paths = [str(self.path.parent / Path(cell).expanduser()) for cell in cells]
        rows: dict[str, int] = {}
        for row, path in enumerate(paths):
            if (first := rows.setdefault(path, row)) != row:
                raise UsageError(
                    f"data set {self.name}: {self.path} has {shown(path)} twice, in rows "
                    f"{first + 1} and {row + 1}; expected a row for each image, several labels "
                    f"separated by {SEPARATOR}"
                )
        return paths

    def _splits(self, table: pd.DataFrame) -> list[str]:
        """The split of each row, train without a column of splits.

        A column that was found, not named, is one of splits if it has the name of one.
        """
        names, wanted = list(table), dict(self.columns).get("split")
        columns = known_columns("split", names) if wanted is None else []
        if wanted:
            columns = [self._column("split", names)]
        for column in columns:
            cells = texts_of(self.path, table, column)
            values = list(dict.fromkeys(cells))
            ours = {theirs: ours for ours, theirs in split_names(values, self.name).items()}
            strange = [text for text in values if text not in ours]
            if not strange:
                return [ours[cell] for cell in cells]
            if ours or wanted:
                raise UsageError(
                    f"data set {self.name}: unknown split '{shown(strange[0])}' in {self.path} "
                    f"(column {shown(column)}), expected train, val and test; ?split= ignores it"
                )
            logger.warning(
                "%s: the column %s of %s has no split's name but '%s' and the like; it is ignored",
                self.name,
                shown(column),
                self.path,
                shown(strange[0]),
            )
        return ["train"] * len(table)

    def _column(self, kind: str, names: list[str]) -> str:
        wanted = dict(self.columns).get(kind)
        if wanted is not None and wanted in names:
            return wanted
        if wanted is None and (found := known_columns(kind, names)):
            return found[0]
        what, option = f"column {shown(wanted)}", f"?{kind}=COLUMN"
        if wanted is None:
            what = f"{_WHAT.get(kind, kind)} column"
            option = {"image": "?text=COLUMN or ?image=COLUMN"}.get(kind, option)
        mark = next((each for each in ";,|\t" if len(names) == 1 and each in names[0]), "")
        hint = f"; if {shown(mark)} separates columns, save it with commas, as .csv" if mark else ""
        raise UsageError(
            f"data set {self.name}: {self.path} has no {what}; its columns are "
            f"{', '.join(map(shown, names))}. Name one as in {self.name}={self.path.name}{option}"
            f"{hint}"
        )


def read_table(path: Path) -> pd.DataFrame:
    """The columns of a CSV, TSV, Parquet or JSON-lines file.

    Raises:
        MissingFileError: if it does not exist.
        UsageError: if it cannot be read, or its cells are quoted wrongly.
    """
    import pandas as pd

    ending = path.suffix.lower()
    with readable(path, f"a table ({ending.lstrip('.').upper()})"):
        if ending == ".parquet":
            try:
                frame = pd.read_parquet(path)
            except ImportError as error:
                raise UsageError(
                    f"{path}: Parquet needs the library pyarrow, which is not installed (pip "
                    "install pyarrow); or save the table as CSV"
                ) from error
        elif ending == ".jsonl":
            frame = _read_json_lines(path)
        else:
            frame = _read_tsv(path) if ending == ".tsv" else _read_csv(path)
            if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first for its index
                raise UsageError(
                    f"{path} has more fields than its {len(frame.columns)} columns in row 1; put "
                    f"texts with a {'tab' if ending == '.tsv' else 'comma'} in quotation marks"
                )
    return frame.rename(columns=str)


def texts_of(path: Path, table: pd.DataFrame, column: str, lists: bool = False) -> list[str]:
    """The cells of a column as texts; an empty cell is empty.

    Args:
        path: of the table, for messages.
        table: the table.
        column: the name of the column.
        lists: whether a cell may hold several values, which are separated by `SEPARATOR`.

    Raises:
        UsageError: if a cell holds something else.
    """
    texts, cells = [], table[column]
    if isinstance(cells.dtype, np.dtype) and cells.dtype.kind == "f":
        cells = cells.to_numpy()  # or 0.1 in float32 would be 0.10000000149011612
    for row, cell in enumerate(cells, 1):
        try:
            texts.append(_text(cell, lists))
        except (TypeError, UnicodeDecodeError) as error:
            encoded = isinstance(error, UnicodeDecodeError)
            raise UsageError(
                f"{path} has {'bytes that are not UTF-8' if encoded else 'several values'} in row "
                f"{row} of the column {shown(column)}; expected a text in UTF-8 or a number; "
                "convert the column, or name another one"
            ) from error
    return texts


def _parsed(source: Any, **options: Any) -> pd.DataFrame:
    """The cells of a CSV file as texts."""
    import pandas as pd

    return pd.read_csv(source, dtype=str, keep_default_na=False, **options)


def _read_csv(path: Path) -> pd.DataFrame:
    """The cells of a CSV file as texts.

    Raises:
        UsageError: if the quoting is at fault, of which pandas would join rows without a word.
    """
    with path.open(encoding="utf-8-sig", newline="") as lines:
        _check_quoting(path, lines, ",")
    return _parsed(path, encoding="utf-8-sig")


def _check_quoting(path: Path, lines: Iterable[str], mark: str) -> None:
    """Raises a UsageError if a cell goes on after its closing quotation mark, or has none."""
    csv.field_size_limit(LONGEST_CELL)
    rows, before = csv.reader(lines, delimiter=mark, strict=True), 0
    try:
        for _ in rows:
            before = rows.line_num
    except csv.Error as error:
        raise UsageError(
            f"{path} is quoted wrongly in the row that begins in line {before + 1} ({error}); put "
            f"texts with a {'tab' if mark == TAB else 'comma'} or a quotation mark in quotation "
            "marks, and double those inside"
        ) from error


def _read_json_lines(path: Path) -> pd.DataFrame:
    """The values of a file with a JSON object a line, as they are.

    Raises:
        UsageError: if a line is no object, or there is none.
    """
    import pandas as pd

    rows, expected = [], 'expected an object a line, such as {"text": "so good", "label": 1}'
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(
                    f"{path}: line {number} is no JSON ({shown(error)}); {expected}"
                ) from error
            if not isinstance(row, dict):
                raise UsageError(
                    f"{path}: line {number} is a JSON {type(row).__name__}; {expected}"
                )
            rows.append(row)
    if not rows:
        raise UsageError(f"{path} is empty; {expected}")
    return pd.DataFrame(rows, dtype=object)


def _read_tsv(path: Path) -> pd.DataFrame:
    """The cells of a TSV file as texts.

    Where every line has the same number of tabs, no cell spans several of them, and a quotation
    mark at the start of a text is one of the text. So it is where cells are not quoted without a
    fault, and no line has more tabs than the first.

    Raises:
        UsageError: if a line has more, and the quoting is at fault.
    """
    text = read_text(path)
    tabs = [line.count(TAB) for line in text.split("\n") if line.strip()]
    if len(set(tabs)) > 1:
        try:
            _check_quoting(path, io.StringIO(text), TAB)
            return _parsed(io.StringIO(text), sep=TAB)
        except UsageError:
            if max(tabs) > tabs[0]:
                raise
    frame = _parsed(io.StringIO(text), sep=TAB, quoting=csv.QUOTE_NONE)
    return frame.map(_unquoted).rename(columns=_unquoted)


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


def _text(cell: Any, lists: bool = False) -> str:
    """A cell as text.

    Raises:
        TypeError: if it holds several values, unless they are a list and `lists` says so.
        UnicodeDecodeError: if it holds bytes that are not UTF-8.
    """
    import pandas as pd

    if isinstance(cell, bytes):
        return cell.decode().strip()
    if isinstance(cell, list | tuple | np.ndarray) and lists:  # Parquet has lists of labels
        return SEPARATOR.join(map(_text, cell)) + (SEPARATOR if len(cell) == 1 else "")
    if isinstance(cell, Mapping | list | tuple | np.ndarray):
        raise TypeError
    if pd.isna(cell):
        return ""
    if isinstance(cell, float | np.floating) and cell.is_integer():  # integers, some missing
        return str(int(cell))
    return str(cell).strip()


def _labels(cell: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in cell.split(SEPARATOR) if part.strip()))


def _in_order(labels: set[str]) -> list[str]:
    """Sorted as numbers if all are integers, else as texts."""
    if all(INTEGER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _below(path: str, folder: Path) -> str:
    """A path relative to the folder if it lies in it."""
    inside = Path(path).is_relative_to(folder)
    return Path(path).relative_to(folder).as_posix() if inside else path
