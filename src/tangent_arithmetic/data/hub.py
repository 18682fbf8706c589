"""Data sets of the Hugging Face hub, through the library `datasets` (the extra `hub`).

Class ids there are turned into ours by the classes' names; rows keep the hub's order.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tangent_arithmetic.data.base import Splits, name_of
from tangent_arithmetic.data.pictures import to_rgb
from tangent_arithmetic.runtime.errors import (
    MissingFileError,
    PictureError,
    UsageError,
    hub_failure,
    shown,
)

TAIL = 1024  # bytes at the end of a picture's file, by which two of one size are told apart


@dataclass(frozen=True)
class HubSet:
    """A data set as the hub has it.

    Attributes:
        repo: its name there, or a folder that the library can load.
        classnames: our phrases, in the order of our labels.
        config: which of the repository's configurations; None for its only one.
        files: pattern of the files of a split, where the repository has splits that nobody needs
            (they would be downloaded too); None for all that the configuration names.
        label: the column of the labels, where there are several.
        aliases: name of a class there -> our phrase, where they differ in more than case, spaces
            and punctuation.
    """

    repo: str
    classnames: tuple[str, ...]
    config: str | None = None
    files: str | None = None
    label: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HubPictures:
    """The rows of one split.

    Attributes:
        rows: a `datasets.Dataset`.
        image: the column of the pictures.
        label: the column of the labels.
        labels: our label of each class id of the hub.
    """

    rows: Any
    image: str
    label: str
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A picture, in RGB, and our label."""
        row = self.rows[index]
        name = name_of(self, index)
        if row[self.image] is None:
            raise PictureError(f"{name} is empty: the column {shown(self.image)} has no picture")
        return to_rgb(row[self.image], name), self.labels[row[self.label]]

    def digests(self) -> list[Hashable]:
        """Size and end of each picture's file; of a picture that is not in the rows, its path."""
        found: list[Hashable] = []
        for batch in self.rows.select_columns([self.image]).with_format("arrow").iter(1000):
            for cell in batch.column(self.image):
                content = cell["bytes"].as_buffer() if cell.is_valid else None
                if content is None:
                    found.append(cell["path"].as_py() if cell.is_valid else None)
                else:
                    end = content.slice(max(0, content.size - TAIL)).to_pybytes()
                    found.append((content.size, end))
        return found

    @property
    def identity(self) -> str:
        """Differs where rows differ; the same for every load of the same files."""
        return f"{self.rows._fingerprint}|{self.image}|{self.label}|{self.labels}"


def load_hub(name: str, hub: HubSet) -> Splits:
    """Reads a data set from the hub, or from what the library has kept of it.

    Raises:
        MissingFileError: if the library is not installed or the hub cannot be reached.
        UsageError: if the set's columns or classes are not those expected.
    """
    files = hub.files and {split: hub.files.format(split) for split in ("train", "test")}
    found = load_rows(name, hub.repo, hub.config, data_files=files or None)
    if lacking := [split for split in ("train", "test") if split not in found]:
        raise UsageError(
            f"data set {name}: {hub.repo} has the splits {', '.join(found)}, expected train and "
            f"test; {' and '.join(lacking)} is not there"
        )
    train, test = (pictures_of(name, hub, found[split]) for split in ("train", "test"))
    return Splits(train, test, hub.classnames)


def load_rows(
    name: str, repo: str, config: str | None, split: str | None = None, data_files: Any = None
) -> Any:
    """What the library has of a repository: the rows of a split, or all splits.

    Raises:
        MissingFileError: if the library is not installed or the hub cannot be reached.
    """
    try:
        from datasets import config as library
        from datasets import load_dataset
    except ImportError as error:
        raise MissingFileError(
            f"data set {name}: {repo} needs the library datasets, which is not installed "
            '(pip install -e ".[hub]")'
        ) from error
    library.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 a set could bring code along
    try:
        return load_dataset(repo, config, split=split, data_files=data_files)
    except Exception as error:  # it has no error of its own: no network, no such set, a full disk
        raise MissingFileError(
            f"data set {name}: {repo} cannot be loaded {hub_failure(error)}"
        ) from error


def classes_of(name: str, repo: str, rows: Any) -> tuple[str, ...]:
    """The classes of rows, by the names of their label column."""
    return tuple(rows.features[_column(name, repo, rows, "ClassLabel", None)].names)


def pictures_of(name: str, hub: HubSet, rows: Any) -> HubPictures:
    """The pictures of rows, with our labels.

    Raises:
        UsageError: if columns or classes are not those expected.
    """
    image = _column(name, hub.repo, rows, "Image", None)
    label = _column(name, hub.repo, rows, "ClassLabel", hub.label)
    labels = match_classes(name, hub, rows.features[label].names)
    for index, number in enumerate(rows[label][:]):
        if number is None or not 0 <= number < len(labels):
            raise UsageError(
                f"data set {name}: row {index} of {hub.repo} has label {number} in the column "
                f"{shown(label)}, expected 0 to {len(labels) - 1}: this split has no labels there, "
                "or not all. Use another --data-source"
            )
    return HubPictures(rows, image, label, labels)


def _column(name: str, repo: str, rows: Any, kind: str, wanted: str | None) -> str:
    """The one column of a kind of feature, whatever its name; `wanted` if there are several."""
    columns = [c for c, feature in rows.features.items() if type(feature).__name__ == kind]
    if wanted in columns:
        return str(wanted)
    if len(columns) != 1:
        raise UsageError(
            f"data set {name}: expected one column of type {kind} in {repo}, got "
            f"{', '.join(columns) or 'none'} of the columns {', '.join(rows.features)}"
        )
    return str(columns[0])


def match_classes(name: str, hub: HubSet, theirs: list[str]) -> tuple[int, ...]:
    """Our label of each class of the hub, by name: case, spaces and punctuation do not count.

    Raises:
        UsageError: if the names are not ours, one to one; they are never paired by position.
    """
    labels = {_plain(phrase): label for label, phrase in enumerate(hub.classnames)}
    labels |= {_plain(alias): labels[_plain(ours)] for alias, ours in hub.aliases.items()}
    found = [labels.get(_plain(their)) for their in theirs]
    known = [label for label in found if label is not None]
    if len(known) < len(found) or sorted(known) != list(range(len(hub.classnames))):
        strange = [their for their, label in zip(theirs, found, strict=True) if label is None]
        absent = [ours for label, ours in enumerate(hub.classnames) if label not in known]
        raise UsageError(
            f"data set {name}: the classes of {hub.repo} cannot be matched with ours by name "
            f"(expected {len(hub.classnames)}, got {len(theirs)}; theirs alone: "
            f"{', '.join(strange[:5]) or 'none'}; ours alone: {', '.join(absent[:5]) or 'none'}), "
            "so that its labels would mean something else. Use another --data-source"
        )
    return tuple(known)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
