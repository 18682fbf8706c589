"""Data sets of the Hugging Face hub, through the library `datasets` (the extra `hub`).

Labels are matched by class name; rows keep the hub's order.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset

TAIL = 1024  # bytes at the end of an image file that distinguish two of equal size


@dataclass(frozen=True)
class HubSet:
    """Where and how the hub has a data set.

    Attributes:
        repo: its repository, or a folder that the library can load.
        classnames: our class names, in the order of our labels.
        config: configuration of the repository; None for the only one.
        files: file pattern of a split, to avoid downloading unneeded splits; None for all files of
            the configuration.
        label: the label column, where there are several.
        test: the hub's name of the test split.
        aliases: the hub's class name -> ours, where they differ in more than case, spaces and
            punctuation.
    """

    repo: str
    classnames: tuple[str, ...]
    config: str | None = None
    files: str | None = None
    label: str | None = None
    test: str = "test"
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HubPictures:
    """The rows of one split.

    Attributes:
        rows: a `datasets.Dataset`.
        image: the image column.
        label: the label column.
        labels: our label for each value of the label column.
    """

    rows: Any
    image: str
    label: str
    labels: tuple[int, ...] | Mapping[Any, int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.rows[index]
        name = name_of(self, index)
        if row[self.image] is None:
            raise PictureError(f"{name} is empty: the column {shown(self.image)} has no image")
        return to_rgb(row[self.image], name), self.labels[row[self.label]]

    def digests(self) -> list[Hashable]:
        """Size and last bytes of each image file, or its path if the rows do not embed it."""
        digests: list[Hashable] = []
        for batch in self.rows.select_columns([self.image]).with_format("arrow").iter(1000):
            for cell in batch.column(self.image):
                content = cell["bytes"].as_buffer() if cell.is_valid else None
                if content is None:
                    digests.append(cell["path"].as_py() if cell.is_valid else None)
                else:
                    end = content.slice(max(0, content.size - TAIL)).to_pybytes()
                    digests.append((content.size, end))
        return digests

    @property
    def identity(self) -> str:
        """A string that identifies the rows, the same each time that the same files are loaded."""
        return f"{self.rows._fingerprint}|{self.image}|{self.label}|{self.labels}"


def load_hub(name: str, hub: HubSet) -> Splits:
    """Reads a data set from the hub, or from the library's cache.

    Raises:
        MissingFileError: if the library is not installed or the hub cannot be reached.
        UsageError: if the columns or classes are not as expected.
    """
    wanted = ("train", hub.test)
    files = hub.files and {split: hub.files.format(split) for split in wanted}
    splits = load_rows(name, hub.repo, hub.config, data_files=files or None)
    if missing := [split for split in wanted if split not in splits]:
        raise UsageError(
            f"data set {name}: {hub.repo} has the splits {', '.join(splits)}, expected "
            f"{' and '.join(wanted)}; {' and '.join(missing)} is missing"
        )
    train, test = (pictures_of(name, hub, splits[split]) for split in wanted)
    return Splits(train, test, hub.classnames)


def load_rows(
    name: str,
    repo: str,
    config: str | None,
    split: str | None = None,
    data_files: Mapping[str, str] | None = None,
) -> Any:
    """Loads the rows of one split of a repository, or all splits.

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
    library.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 a set could run its own code
    try:
        return load_dataset(repo, config, split=split, data_files=data_files)
    except Exception as error:  # no common type: no network, no such repository, a full disk
        raise MissingFileError(
            f"data set {name}: {repo} cannot be loaded {hub_failure(error)}"
        ) from error


def classes_of(name: str, repo: str, rows: HubDataset) -> tuple[str, ...]:
    """The class names of rows, from their label column."""
    return tuple(rows.features[_column(name, repo, rows, "ClassLabel", None)].names)


def pictures_of(name: str, hub: HubSet, rows: HubDataset) -> HubPictures:
    """The images of rows, with our labels.

    Raises:
        UsageError: if the columns or classes are not as expected.
    """
    image = _column(name, hub.repo, rows, "Image", None)
    label = _column(name, hub.repo, rows, "ClassLabel", hub.label)
    labels = match_classes(name, hub, rows.features[label].names)
    for index, number in enumerate(rows[label][:]):
        if number is None or not 0 <= number < len(labels):
            raise UsageError(
                f"data set {name}: row {index} of {hub.repo} has label {number} in the column "
                f"{shown(label)}, expected 0 to {len(labels) - 1}: this split is unlabelled, at "
                "least in part. Use another --data-source"
            )
    return HubPictures(rows, image, label, labels)


def _column(name: str, repo: str, rows: Any, kind: str, wanted: str | None) -> str:
    """The only column with this type of feature, or `wanted` if there are several."""
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
    """Our label for each class of the hub, matched by name up to case, spaces and punctuation.

    Raises:
        UsageError: if the names do not match ours one to one; they are never paired by position.
    """
    ours = {_plain(classname): label for label, classname in enumerate(hub.classnames)}
    ours |= {_plain(alias): ours[_plain(classname)] for alias, classname in hub.aliases.items()}
    labels = [ours[_plain(their)] for their in theirs if _plain(their) in ours]
    if len(labels) < len(theirs) or sorted(labels) != list(range(len(hub.classnames))):
        extra = [their for their in theirs if _plain(their) not in ours]
        missing = [name for label, name in enumerate(hub.classnames) if label not in labels]
        raise UsageError(
            f"data set {name}: the classes of {hub.repo} cannot be matched with ours by name "
            f"(expected {len(hub.classnames)}, got {len(theirs)}; only theirs: "
            f"{', '.join(extra[:5]) or 'none'}; only ours: {', '.join(missing[:5]) or 'none'}), "
            "so its labels would have another meaning. Use another --data-source"
        )
    return tuple(labels)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
