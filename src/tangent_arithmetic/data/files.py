"""Data sets of files: one walk over class folders, and one kind of pictures for all of them."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tangent_arithmetic.data.pictures import read_rgb
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import readable

logger = logging.getLogger(__name__)

EXTENSIONS = (
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

Identity = tuple[int, int]  # device and inode: of a folder, by whatever path it is reached


@dataclass(frozen=True)
class ListedPictures:
    """Pictures in files.

    Attributes:
        samples: path and label of each.
        classes: the classes, in the order of their labels.
        root: the folder that they are in.
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
        return read_rgb(path), label

    def with_every_class(self) -> ListedPictures:
        """The same, if no class is without a picture.

        Raises:
            MissingFileError: if one is.
        """
        labels = {label for _, label in self.samples}
        if empty := [name for label, name in enumerate(self.classes) if label not in labels]:
            raise MissingFileError(
                f"no picture of the classes {', '.join(map(shown, empty[:5]))} in {self.root}; "
                f"expected files with one of the endings {', '.join(EXTENSIONS)}"
            )
        return self


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not meant to be seen: a dot before its name, or a system's."""
    return name.startswith(".") or name in SYSTEM


def class_folders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted: the order of the labels. Hidden ones are none."""
    with readable(root, "a folder with one folder of pictures a class"):
        return sorted(
            e.name for e in _entries(str(root)) if _is_folder(e) and not is_hidden(e.name)
        )


def class_pictures(root: Path) -> ListedPictures:
    """The pictures of every class folder in `root`, sorted by class, then by path.

    Those whose name ends in one of `EXTENSIONS`, in any case, at any depth. Hidden files and
    folders, other files, and links to folders that are counted already are left out; how many is
    logged in one line.

    Raises:
        MissingFileError: if a class has no picture, or a picture is a link that leads nowhere.
        UsageError: if a folder cannot be read, or two classes are one folder.
    """
    classes = class_folders(root)
    with readable(root, "a folder with one folder of pictures a class"):
        walk = _Walk(root, classes)
    if walk.left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(walk.left_out.items()))
        logger.info(
            "%s: %d pictures, left out: %s; the first is %s",
            root, len(walk.samples), counts, shown(walk.first),
        )  # fmt: skip
    return ListedPictures(walk.samples, classes, root).with_every_class()


def require_files(paths: Iterable[str], listing: str | Path, name: str) -> None:
    """Checks that the pictures that a list names are there.

    Args:
        paths: of the pictures.
        listing: the list, for the message.
        name: the data set, for the message.

    Raises:
        MissingFileError: if one is not there.
    """
    paths = list(paths)
    if absent := [path for path in paths if not os.path.isfile(path)]:  # noqa: PTH113 - many
        raise MissingFileError(
            f"data set {name} is not complete: of the {len(paths)} pictures in {listing}, "
            f"{len(absent)} are not there, the first {shown(absent[0])}"
        )


class _Walk:
    """A walk over class folders that enters no folder twice, however links lead.

    Args:
        root: the folder of the class folders.
        classes: the names of these.

    Attributes:
        samples: path and label of each picture, sorted by label, folder and name.
        left_out: what was left out, by kind.
        first: the first of these.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self.left_out: Counter[str] = Counter()
        self.first = ""
        self._found: list[tuple[int, str, str]] = []  # label, folder, path
        self._links: deque[tuple[int, str]] = deque()
        self._entered = {_identity(path) for path in (root, *root.resolve().parents)}
        self._take_classes(root, classes)
        for entry in _entries(str(root)):
            if is_hidden(entry.name):
                self._leave(entry.path, "hidden")
            elif not _is_folder(entry):
                self._leave(entry.path, "outside of the class folders")
        for label, name in enumerate(classes):
            self._walk(label, str(root / name))
        while self._links:  # last, so that a folder is taken by its own path where it has one
            label, path = self._links.popleft()
            if self._enter(path):
                self._walk(label, path)
        self.samples = [(path, label) for label, _, path in sorted(self._found)]

    def _take_classes(self, root: Path, classes: Sequence[str]) -> None:
        own: dict[Identity, str] = {}
        for name in classes:
            other = own.setdefault(_identity(root / name), name)
            if other != name:
                raise UsageError(
                    f"the class folders {shown(other)} and {shown(name)} of {root} are one folder, "
                    "so that its pictures would have two labels; remove the link"
                )
        self._entered |= own.keys()

    def _walk(self, label: int, start: str) -> None:
        pending = [start]
        while pending:
            folder = pending.pop()
            for entry in _entries(folder):
                if is_hidden(entry.name):
                    self._leave(entry.path, "hidden")
                elif _is_folder(entry):
                    if entry.is_symlink():
                        self._links.append((label, entry.path))
                    elif self._enter(entry.path):
                        pending.append(entry.path)
                elif self._is_picture(entry):
                    self._found.append((label, folder, entry.path))

    def _enter(self, path: str) -> bool:
        identity = _identity(path)
        if identity in self._entered:
            self._leave(path, "linked twice")
            return False
        self._entered.add(identity)
        return True

    def _is_picture(self, entry: os.DirEntry[str]) -> bool:
        _, dot, ending = entry.name.lower().rpartition(".")
        if dot + ending not in EXTENSIONS:
            self._leave(entry.path, dot + shown(ending) if dot else "without an ending")
            return False
        if not Path(entry.path).is_file():
            if entry.is_symlink():
                raise MissingFileError(f"{entry.path} is a link that leads to no file")
            self._leave(entry.path, "no regular file")
            return False
        return True

    def _leave(self, path: str, kind: str) -> None:
        self.first = self.first or path
        self.left_out[kind] += 1


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> Identity:
    facts = Path(path).stat()
    return facts.st_dev, facts.st_ino
