"""What the loaders share: checks of files and class folders before torchvision reads them."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from src.data.base import require
from src.errors import MissingFileError, UsageError

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

Read = TypeVar("Read")


def folder_names(path: Path) -> list[str]:
    """The names of the folders in `path`, sorted: the order of ImageFolder's labels."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def spaced(name: str) -> str:
    """A folder name as a phrase: underscores become spaces."""
    return name.replace("_", " ")


def listed(text: str) -> tuple[str, ...]:
    """The class names in a text, with commas between them; lines may break anywhere."""
    return tuple(" ".join(name.split()) for name in text.split(","))


def require_all(folder: Path, files: Iterable[str], name: str, layout: str) -> None:
    """Raises a MissingFileError for the first of `files` that `folder` lacks (see `require`)."""
    for file in files:
        require(folder / file, name, layout)


def read_checked(name: str, path: Path, read: Callable[[], Read]) -> Read:
    """Returns `read()`; what torchvision says of damaged files becomes a UsageError.

    Args:
        name: the data set, for the message.
        path: where its files are, for the message.
        read: calls a reader of torchvision; its files exist.

    Raises:
        UsageError: if a file is not what it should be, for instance after a broken download.
    """
    try:
        return read()
    except (RuntimeError, AssertionError, ValueError, LookupError, OSError) as error:
        reason = str(error).partition(" You can use download")[0] or type(error).__name__
        raise UsageError(
            f"data set {name} cannot be read from {path}: {reason.rstrip('.')}. A file there is "
            "damaged or incomplete; fetch it again."
        ) from error


@dataclass(frozen=True)
class ClassFolders:
    """How a data set lies on disk that has one folder of pictures a class.

    Attributes:
        name: the data set, for messages.
        layout: what is expected below the data root, in words.
        count: number of classes.
        pattern: regular expression that every folder name matches.
    """

    name: str
    layout: str
    count: int
    pattern: str

    def check(self, path: Path) -> list[str]:
        """Returns the class folders in `path`, in the order of their labels.

        Raises:
            MissingFileError: if `path` does not exist.
            UsageError: if a folder is not a class, or a class has no folder: labels are counted
                along the folders, so that either would shift them.
        """
        names = folder_names(require(path, self.name, self.layout))
        strange = [name for name in names if not re.fullmatch(self.pattern, name)]
        if strange or len(names) != self.count:
            raise UsageError(
                f"data set {self.name}: expected {self.count} class folders in {path}, named like "
                f"{self.pattern}; got {len(names)}"
                + (f", of which not a class: {', '.join(strange[:5])}" if strange else "")
                + f". Expected below --data-location: {self.layout}."
            )
        return names

    def check_same(self, paths: Iterable[Path]) -> list[str]:
        """Like `check` for the folders of several splits, which must have the same classes."""
        first, *others = paths
        names = self.check(first)
        for other in others:
            if differing := sorted(set(names) ^ set(self.check(other))):
                raise UsageError(
                    f"data set {self.name}: {first} and {other} must hold the same class folders, "
                    f"got one without the other: {', '.join(differing[:10])}"
                )
        return names

    def pictures(
        self, path: Path, is_valid_file: Callable[[str], bool] | None = None
    ) -> ImageFolder:
        """The pictures below `path`, sorted by class, then by file name.

        Raises:
            MissingFileError: if a class has no picture.
        """
        from torchvision.datasets import ImageFolder

        try:
            return ImageFolder(path, is_valid_file=is_valid_file)
        except FileNotFoundError as error:
            raise MissingFileError(
                f"data set {self.name} is not complete below {path}: {error}. Expected below "
                f"--data-location: {self.layout}."
            ) from error

    def read(self, *paths: Path) -> list[ImageFolder]:
        """Reads the splits of a data set; no two of them may share a picture.

        Raises:
            MissingFileError: if a folder or the pictures of a class are missing.
            UsageError: if the classes are not as expected or a picture is in two splits.
        """
        self.check_same(paths)
        splits = [self.pictures(path) for path in paths]
        for one, other in combinations(splits, 2):
            refuse_shared(self.name, one, other)
        return splits

    def read_lists(self, root: Path, *splits: tuple[Path, ...]) -> list[ListedPictures]:
        """Reads splits that are lists of files, in the order that class folders would give.

        Args:
            root: the folder below which the files are.
            splits: for each split the lists that it consists of; a line is a path below `root`,
                for instance banded/banded_0002.jpg.

        Raises:
            MissingFileError: if a list or a picture that it names is missing.
            UsageError: if the classes are not as expected or a picture is in two splits.
        """
        found = [self._listed_files(root, lists) for lists in splits]
        for one, other in combinations(found, 2):
            if shared := sorted(set(one) & set(other)):
                raise UsageError(
                    f"data set {self.name}: {shared[0]} is in two splits of {root} "
                    f"({len(shared)} pictures are), so that the accuracy on it would mean nothing"
                )
        return [self._labelled(root, files) for files in found]

    def _listed_files(self, root: Path, lists: tuple[Path, ...]) -> list[str]:
        lines = [
            line.strip().lstrip("/")
            for path in lists
            for line in require(path, self.name, self.layout)
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        files = sorted({line for line in lines if line}, key=_class_then_name)
        if absent := [file for file in files if not (root / file).is_file()]:
            raise MissingFileError(
                f"data set {self.name} is not complete: of the {len(files)} pictures in "
                f"{', '.join(map(str, lists))}, {len(absent)} are not in {root}, the first "
                f"{absent[0]}"
            )
        return files

    def _labelled(self, root: Path, files: list[str]) -> ListedPictures:
        classes = sorted({_class_then_name(file)[0] for file in files})
        strange = [name for name in classes if not re.fullmatch(self.pattern, name)]
        if strange or len(classes) != self.count:
            raise UsageError(
                f"data set {self.name}: expected {self.count} classes in the lists of {root}, "
                f"named like {self.pattern}; got {len(classes)}"
                + (f", of which not a class: {', '.join(strange[:5])}" if strange else "")
            )
        labels = {name: label for label, name in enumerate(classes)}
        samples = [(str(root / file), labels[_class_then_name(file)[0]]) for file in files]
        return ListedPictures(samples, classes, root)


def _class_then_name(file: str) -> tuple[str, str]:
    """The class and the name of a listed file: a/abbey/x.jpg is x.jpg of a_abbey."""
    *folders, name = file.split("/")
    return "_".join(folders), name


@dataclass(frozen=True)
class ListedPictures:
    """Pictures that lists name.

    Attributes:
        samples: path and label of each.
        classes: the classes, in the order of their labels.
        root: the folder that the lists' paths start from.
    """

    samples: list[tuple[str, int]]
    classes: list[str]
    root: Path

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A picture, in RGB, and its label."""
        path, label = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def refuse_shared(name: str, one: ImageFolder, other: ImageFolder) -> None:
    """Raises a UsageError if a picture, the same file under the same name, is in both splits."""
    copies = {path.removeprefix(str(other.root)): path for path, _ in other.samples}
    for path, _ in one.samples:
        copy = copies.get(path.removeprefix(str(one.root)))
        if copy and filecmp.cmp(path, copy, shallow=False):
            raise UsageError(
                f"data set {name}: {path} and {copy} are one picture in two splits, so that the "
                "accuracy on it would mean nothing. Make the splits again without overlap."
            )


@dataclass(frozen=True)
class LazyPictures:
    """The pictures of a folder that is so large that it is only listed when first used."""

    folders: ClassFolders
    path: Path

    @cached_property
    def listing(self) -> ImageFolder:
        """The pictures, listed at the first use."""
        return self.folders.pictures(self.path)

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A picture and its label."""
        return self.listing[index]
