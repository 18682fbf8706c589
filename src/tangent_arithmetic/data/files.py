"""Image files: a walk over class folders, and the type of data set for all of them."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from tangent_arithmetic.data.pictures import read_rgb
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

FORMATS = "avif bmp dib gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
EXTENSIONS = tuple(f".{name}" for name in FORMATS.split())
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

LAYOUT = "a folder with one folder of images per class"


@dataclass(frozen=True)
class ListedPictures:
    """Images in files.

    Attributes:
        samples: path and label of each.
        classes: the class names, in the order of their labels.
        root: the folder that holds them.
    """

    samples: list[tuple[str, int]]
    classes: list[str]
    root: Path

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_rgb(path), label

    def with_every_class(self) -> ListedPictures:
        """Returns itself if every class has an image.

        Raises:
            MissingFileError: otherwise.
        """
        labels = {label for _, label in self.samples}
        if empty := [name for label, name in enumerate(self.classes) if label not in labels]:
            raise MissingFileError(
                f"no images of the classes {', '.join(map(shown, empty[:5]))} in {self.root}; "
                f"expected files with one of the extensions {', '.join(EXTENSIONS)}"
            )
        return self


@dataclass(frozen=True)
class LazyPictures:
    """The images of a very large folder, listed by `read` when first used."""

    read: Callable[[], ListedPictures]

    @cached_property
    def listing(self) -> ListedPictures:
        """The images."""
        return self.read()

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.listing[index]


def samples_of(pictures: object) -> Sequence[tuple[str | Path, int]] | None:
    """Path and label of each image, if a data set, ours or torchvision's, reads files; else None.

    A lazy data set is listed.
    """
    if isinstance(pictures, LazyPictures):
        pictures = pictures.listing
    return getattr(pictures, "samples", None) or getattr(pictures, "_samples", None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to the operating system."""
    return name.startswith(".") or name in SYSTEM


def class_folders(root: Path) -> list[str]:
    """The names of the class folders in `root`, sorted as the labels are; skips hidden folders."""
    with readable(root, LAYOUT):
        return sorted(
            e.name for e in _entries(str(root)) if _is_folder(e) and not is_hidden(e.name)
        )


def class_pictures(root: Path) -> ListedPictures:
    """The images of all class folders in `root`, sorted by class, then by path.

    Includes files with one of `EXTENSIONS`, in any case and at any depth. Hidden files and folders,
    other files, and links to folders already visited are skipped; one line of the log counts them.

    Raises:
        MissingFileError: if a class has no image, or an image is a broken link.
        UsageError: if a folder cannot be read, or two class folders are the same.
    """
    classes = class_folders(root)
    with readable(root, LAYOUT):
        walk = _Walk(root, classes)
    if walk.skipped:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(walk.skipped.items()))
        text = "%s: %d images, skipped: %s; the first is %s"
        logger.info(text, root, len(walk.samples), counts, shown(walk.first_skipped))
    return ListedPictures(walk.samples, classes, root).with_every_class()


def require_files(paths: Iterable[str], listing: str | Path, name: str, remedy: str = "") -> None:
    """Raises a MissingFileError if an image of a data set is missing.

    Args:
        paths: its images.
        listing: the file that lists them, for the message.
        name: the data set, likewise.
        remedy: what else the user may have meant.
    """
    paths = list(paths)
    if absent := [path for path in paths if not os.path.isfile(path)]:  # noqa: PTH113 - many
        raise MissingFileError(
            f"data set {name} is not complete: of the {len(paths)} images in {listing}, "
            f"{len(absent)} are missing, the first {shown(absent[0])}{remedy}"
        )


class _Walk:
    """A walk over the class folders in `root` that enters each folder once, whatever the links.

    Attributes:
        samples: path and label of each image, sorted by label, folder and name.
        skipped: number of files and folders skipped, by reason.
        first_skipped: the first of these.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self.skipped: Counter[str] = Counter()
        self.first_skipped = ""
        self._images: list[tuple[int, str, str]] = []  # label, folder, path
        self._links: deque[tuple[int, str]] = deque()
        self._entered = {_identity(path) for path in (root, *root.resolve().parents)}
        names: dict[tuple[int, int], str] = {}
        for name in classes:
            if (other := names.setdefault(_identity(root / name), name)) != name:
                raise UsageError(
                    f"the class folders {shown(other)} and {shown(name)} of {root} are the same "
                    "folder, so its images would have two labels; remove the link"
                )
        self._entered |= names.keys()
        for entry in _entries(str(root)):
            if is_hidden(entry.name):
                self._skip(entry.path, "hidden")
            elif not _is_folder(entry):
                self._skip(entry.path, "outside of the class folders")
        for label, name in enumerate(classes):
            self._walk(label, str(root / name))
        while self._links:  # last, so that a folder is entered by its own path if it has one
            label, path = self._links.popleft()
            if self._enter(path):
                self._walk(label, path)
        self.samples = [(path, label) for label, _, path in sorted(self._images)]

    def _walk(self, label: int, start: str) -> None:
        pending = [start]
        while pending:
            folder = pending.pop()
            for entry in _entries(folder):
                if is_hidden(entry.name):
                    self._skip(entry.path, "hidden")
                elif _is_folder(entry):
                    if entry.is_symlink():
                        self._links.append((label, entry.path))
                    elif self._enter(entry.path):
                        pending.append(entry.path)
                elif self._is_picture(entry):
                    self._images.append((label, folder, entry.path))

    def _enter(self, path: str) -> bool:
        identity = _identity(path)
        if identity in self._entered:
            self._skip(path, "linked twice")
            return False
        self._entered.add(identity)
        return True

    def _is_picture(self, entry: os.DirEntry[str]) -> bool:
        _, dot, ending = entry.name.lower().rpartition(".")
        if dot + ending not in EXTENSIONS:
            self._skip(entry.path, dot + shown(ending) if dot else "without an extension")
            return False
        if not Path(entry.path).is_file():
            if entry.is_symlink():
                raise MissingFileError(f"{entry.path} is a broken link; remove or repair it")
            self._skip(entry.path, "not a regular file")
            return False
        return True

    def _skip(self, path: str, reason: str) -> None:
        self.first_skipped = self.first_skipped or path
        self.skipped[reason] += 1


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    """Device and inode."""
    facts = Path(path).stat()
    return facts.st_dev, facts.st_ino
