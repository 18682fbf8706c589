"""Shared by the loaders: checks of files and class folders before torchvision reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tangent_arithmetic.data.base import require
from tangent_arithmetic.data.files import (
    ListedPictures,
    class_folders,
    class_pictures,
    require_files,
)
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import inside, read_text

Read = TypeVar("Read")


def spaced(name: str) -> str:
    """A folder name as a phrase: underscores become spaces."""
    return name.replace("_", " ")


def listed(text: str) -> tuple[str, ...]:
    """The comma-separated class names in a text, which may contain line breaks."""
    return tuple(" ".join(name.split()) for name in text.split(","))


def require_all(name: str, folder: Path, files: Iterable[str], layout: str) -> None:
    """Raises a MissingFileError for the first of `files` that `folder` lacks (see `require`)."""
    for file in files:
        require(folder / file, name, layout)


def read_checked(name: str, path: Path, read: Callable[[], Read]) -> Read:
    """Returns `read()`; torchvision's errors about damaged files become a UsageError.

    Args:
        name: the data set, for the message.
        path: of its files, for the message.
        read: calls a torchvision reader; the files must exist.

    Raises:
        UsageError: if a file is invalid, for instance after a broken download.
    """
    try:
        return read()
    except UsageError:
        raise
    except Exception as error:  # torchvision, SciPy and pickle raise many types
        reason = str(error).partition(" You can use download")[0] or type(error).__name__
        raise UsageError(
            f"data set {name} cannot be read from {path}: {reason.rstrip('.')}. A file there is "
            "damaged or incomplete; fetch it again."
        ) from error


@dataclass(frozen=True)
class ClassFolders:
    """The layout of a data set with one folder of images per class.

    Attributes:
        name: the data set, for messages.
        layout: description of the expected files below the data root.
        count: number of classes.
        pattern: regular expression that every folder name must match.
    """

    name: str
    layout: str
    count: int
    pattern: str

    def check(self, path: Path) -> list[str]:
        """Returns the class folders in `path`, in the order of their labels.

        Raises:
            MissingFileError: if `path` does not exist.
            UsageError: if a folder is not a class or a class has no folder; labels are positions
                among the folders, so either would shift them.
        """
        names = class_folders(require(path, self.name, self.layout))
        return self._check_names(names, f"class folders in {path}")

    def _check_names(self, names: list[str], found: str) -> list[str]:
        strange = [name for name in names if not re.fullmatch(self.pattern, name)]
        if strange or len(names) != self.count:
            wrong = f", of which not a class: {', '.join(map(shown, strange[:5]))}"
            raise UsageError(
                f"data set {self.name}: expected {self.count} {found}, named like {self.pattern}; "
                f"got {len(names)}{wrong if strange else ''}. Expected below --data-location: "
                f"{self.layout}."
            )
        return names

    def check_same(self, paths: Iterable[Path]) -> list[str]:
        """Like `check`, for several splits, which must have the same classes."""
        first, *others = paths
        names = self.check(first)
        for other in others:
            if differing := sorted(set(names) ^ set(self.check(other))):
                raise UsageError(
                    f"data set {self.name}: {first} and {other} must hold the same class folders, "
                    f"but these are in one only: {', '.join(differing[:10])}"
                )
        return names

    def pictures(self, path: Path) -> ListedPictures:
        """The images below `path`, sorted by class, then by file name.

        Raises:
            MissingFileError: if a class has no image.
        """
        try:
            return class_pictures(path)
        except MissingFileError as error:
            raise MissingFileError(
                f"data set {self.name} is not complete below {path}: {error}. Expected below "
                f"--data-location: {self.layout}."
            ) from error

    def read(self, *paths: Path) -> list[ListedPictures]:
        """Reads the splits of a data set.

        Raises:
            MissingFileError: if a folder or the images of a class are missing.
            UsageError: if the classes are not as expected.
        """
        self.check_same(paths)
        return [self.pictures(path) for path in paths]

    def read_lists(self, root: Path, *splits: tuple[Path, ...]) -> list[ListedPictures]:
        """Reads splits defined by lists of files, in the order that class folders would have.

        Args:
            root: the folder that holds the files.
            splits: the lists of each split; a line is a path below `root`, for instance
                banded/banded_0002.jpg.

        Raises:
            MissingFileError: if a list or a listed image is missing.
            UsageError: if a list cannot be read or leads out of `root`, or the classes are not as
                expected.
        """
        return [self._read_list(root, lists) for lists in splits]

    def _read_list(self, root: Path, lists: tuple[Path, ...]) -> ListedPictures:
        lines = [
            str(inside(path, line.strip().lstrip("/")))
            for path in lists
            for line in read_text(require(path, self.name, self.layout)).splitlines()
            if line.strip()
        ]
        files = sorted(set(lines), key=_class_then_name)
        require_files((str(root / file) for file in files), ", ".join(map(str, lists)), self.name)
        classes = sorted({_class_then_name(file)[0] for file in files})
        self._check_names(classes, f"classes in the lists of {root}")
        labels = {name: label for label, name in enumerate(classes)}
        samples = [(str(root / file), labels[_class_then_name(file)[0]]) for file in files]
        return ListedPictures(samples, classes, root)


def _class_then_name(file: str) -> tuple[str, str]:
    """The class and the name of a listed file: a/abbey/x.jpg is x.jpg of class a_abbey."""
    *folders, name = file.split("/")
    return "_".join(folders), name
