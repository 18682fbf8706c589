"""Own data from the Hugging Face hub: image or text, and label columns are found, or named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.columns import known_columns
from tangent_arithmetic.data.hub import HubPictures, load_rows
from tangent_arithmetic.data.identity import labels_of
from tangent_arithmetic.data.own.folders import split_names
from tangent_arithmetic.data.own.words import Names, named, untrained
from tangent_arithmetic.data.splitting import with_test_part
from tangent_arithmetic.data.texts import Texts
from tangent_arithmetic.runtime.errors import UsageError, shown

STRINGS = ("string", "large_string", "string_view")
LABELS = ("label", "labels", "fine_label", "class", "category", "target")


@dataclass(frozen=True)
class HubSource:
    """A data set of the hub.

    Attributes:
        name: the data set, for messages.
        repo: its repository, or a folder that the library `datasets` can load.
        options: of "config", "image", "text", "label", "train", "val" and "test": the
            configuration, the columns and the splits, where they are not found.
        names: class names, see `words.named`; None for those of the label column.
    """

    name: str
    repo: str
    options: tuple[tuple[str, str], ...] = ()
    names: Names = None

    def __call__(self, location: Path) -> Splits:
        """Reads it, from the network or from the library's cache.

        Raises:
            MissingFileError: if the library is not installed or the hub cannot be reached.
            UsageError: if columns or splits cannot be found, or a label is missing.
        """
        chosen = dict(self.options)
        rows = load_rows(self.name, self.repo, chosen.get("config"))
        splits = self._splits(rows, chosen)
        kind = self._kind(rows[splits["train"]].features, chosen)
        column = self._column(rows[splits["train"]], kind, chosen.get(kind))
        label = self._column(rows[splits["train"]], "label", chosen.get("label"))
        classes = self._classes({ours: rows[split] for ours, split in splits.items()}, label)
        parts = {
            ours: self._examples(rows[theirs], kind, column, label, classes)
            for ours, theirs in splits.items()
        }
        train, names = parts["train"], named(self.name, list(classes.values()), self.names)
        whole = Splits(train, parts.get("test", train), names, parts.get("val"), "hub")
        if "test" in parts:
            return whole
        return with_test_part(self.name, whole, labels_of(train).tolist())

    def _kind(self, features: Mapping[str, Any], chosen: Mapping[str, str]) -> str:
        """Whether rows are images or texts: by the column named, or found, images first."""
        if "image" in chosen or "text" in chosen:
            return "image" if "image" in chosen else "text"
        images = any(type(feature).__name__ == "Image" for feature in features.values())
        return "text" if not images and _texts(features) else "image"

    def _splits(self, rows: Mapping[str, Any], chosen: Mapping[str, str]) -> dict[str, str]:
        named = {ours: chosen[ours] for ours in ("train", "val", "test") if ours in chosen}
        for ours, theirs in named.items():
            if theirs not in rows:
                raise UsageError(
                    f"data set {self.name}: {self.repo} has no split {shown(theirs)} for {ours}; "
                    f"it has {', '.join(rows)}"
                )
        rest = [split for split in rows if split not in named.values()]
        found = {} if "train" in named and "test" in named else split_names(rest, self.name)
        splits = {**found, **named}
        if "train" not in splits and len(rows) == 1:
            splits = {"train": next(iter(rows))}
        if "train" not in splits:
            raise UsageError(
                f"data set {self.name}: {self.repo} has the splits {', '.join(rows)}; name that of "
                f"training as in {self.name}=hub:{self.repo}?train=SPLIT"
            )
        return splits

    def _column(self, rows: Any, kind: str, wanted: str | None) -> str:
        features = rows.features
        if wanted is not None and wanted in features:
            return wanted
        types = {name: type(feature).__name__ for name, feature in features.items()}
        of_type = {"image": "Image", "label": "ClassLabel"}.get(kind)
        found = [name for name, type_name in types.items() if type_name == of_type]
        if kind == "text":
            found = _texts(features)
        if kind == "label" and len(found) != 1:
            found = [name for name in LABELS if name in (found or features)][:1] or found
        if wanted is None and len(found) == 1:
            return str(found[0])
        got = ", ".join(f"{name} ({type_name})" for name, type_name in types.items())
        raise UsageError(
            f"data set {self.name}: expected one {kind} column in {self.repo}, got "
            f"{f'no column {shown(wanted)}' if wanted else ', '.join(found) or 'none'} of {got}; "
            f"name it as in {self.name}=hub:{self.repo}?{kind}=COLUMN"
        )

    def _classes(self, splits: Mapping[str, Any], label: str) -> dict[Any, str]:
        """The class name of each value of the label column, in the order of our labels."""
        feature = splits["train"].features[label]
        names = getattr(feature, "names", None)
        if names is not None:
            return dict(enumerate(names))
        if type(feature).__name__ != "Value":
            raise UsageError(
                f"data set {self.name}: the column {shown(label)} of {self.repo} is a "
                f"{type(feature).__name__}, expected an integer or a text in every row; several "
                "labels are read from a table"
            )
        found = {split: rows.unique(label) for split, rows in splits.items()}
        for split, one in ((split, one) for split, values in found.items() for one in values):
            if not _is_label(one):
                raise UsageError(
                    f"data set {self.name}: the column {shown(label)} of {self.repo} has the value "
                    f"{shown(repr(one))} in its {split} split, expected an integer or a text in "
                    f"every row; correct it, or name another column or split as in {self.name}="
                    f"hub:{self.repo}?label=COLUMN"
                )
        trained, values = set(found["train"]), set[Any]().union(*found.values())
        if extra := [str(value) for value in values if value not in trained]:
            remedy = f"name other splits as in {self.name}=hub:{self.repo}?train=SPLIT&test=SPLIT"
            raise untrained(self.name, self.repo, "its training rows", sorted(extra), remedy)
        ordered = sorted(values, key=lambda v: (isinstance(v, str), v))
        return {v: str(int(v) if isinstance(v, float) else v) for v in ordered}

    def _examples(
        self, rows: Any, kind: str, column: str, label: str, classes: dict[Any, str]
    ) -> HubPictures | Texts:
        numbers = {value: number for number, value in enumerate(classes)}
        for index, value in enumerate(rows[label][:]):
            if value not in numbers:
                raise UsageError(
                    f"data set {self.name}: row {index} of {self.repo} has the label "
                    f"{shown(value)}, which is no class: this split is unlabelled, at least in "
                    f"part. Name another one as in {self.name}=hub:{self.repo}?test=SPLIT"
                )
        if kind == "text":
            return self._read(
                rows, column, np.array([numbers[v] for v in rows[label][:]], np.int64)
            )
        values = list(numbers)
        plain = values == list(range(len(values))) and not isinstance(values[0], float)
        return HubPictures(rows, column, label, tuple(range(len(values))) if plain else numbers)

    def _read(self, rows: Any, column: str, labels: np.ndarray) -> Texts:
        texts = rows[column][:]
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(
                    f"data set {self.name}: row {index} of {self.repo} has no text in the column "
                    f"{shown(column)}, got {shown(repr(text))}; remove the row"
                )
        return Texts(tuple(texts), labels, self.repo)


def _is_label(value: Any) -> bool:
    """Whether a value may be a class: a text, an integer, or a float that is one, such as 1.0."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int | str) and value != ""


def _texts(features: Mapping[str, Any]) -> list[str]:
    """The column of texts, by its name: the first of the known names that holds strings."""
    strings = [name for name, one in features.items() if getattr(one, "dtype", "") in STRINGS]
    return known_columns("text", strings)[:1]
