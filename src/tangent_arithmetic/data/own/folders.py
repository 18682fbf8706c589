"""Own data in folders: ImageFolder's layouts.

    ROOT/train/CLASS/*.jpg, ROOT/test/..., and perhaps ROOT/val/...
    ROOT/CLASS/*.jpg, of which a part is for testing (`data/splitting.py`)

With train/ and val/ alone, val/ is the test split, as in ImageNet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.files import EXTENSIONS, ListedPictures, class_folders, class_pictures
from tangent_arithmetic.data.own.words import CLASSNAMES, Names, named, untrained
from tangent_arithmetic.data.splitting import with_test_part
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown

logger = logging.getLogger(__name__)

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
EVALUATED = ("eval", "evaluation")  # of testing, where nothing else is


def split_names(found: list[str], name: str) -> dict[str, str]:
    """Which of the names that a data set has are its splits: ours -> its own.

    Args:
        found: folders, values of a column or splits of a hub.
        name: the data set, for messages.

    Raises:
        UsageError: if there is a test or validation split, but no training split, or two of a kind.
    """
    splits: dict[str, str] = {}
    for ours, names in SPLITS.items():
        theirs = [text for text in found if text.lower() in names]
        if not theirs:  # less usual names, such as training_set
            further = (*names, *(EVALUATED if ours == "test" else ()))
            theirs = [text for text in found if _plain(text) in further]
        if len(theirs) > 1:
            raise UsageError(
                f"data set {name}: {' and '.join(theirs)} are both its {ours} split; keep one, or "
                f"name one of the hub's, as in {name}=hub:ORG/NAME?{ours}={theirs[0]}"
            )
        if theirs:
            splits[ours] = theirs[0]
    if splits and "train" not in splits and splits.get("test", "").lower() in EVALUATED:
        return {}  # a single split, of whatever name
    if splits and "train" not in splits:
        raise UsageError(
            f"data set {name}: expected a split train beside {', '.join(splits.values())}, got "
            f"{', '.join(map(shown, sorted(found)[:8]))}; rename it, or name the data set without "
            "splits to have it split"
        )
    if "val" in splits and "test" not in splits:
        splits["test"] = splits.pop("val")
        logger.info(
            "%s: no test split; %s is used for testing, and validation images are held out of the "
            "training images",
            name,
            splits["test"],
        )
    return splits


def _plain(name: str) -> str:
    """The name of a split in its plainest form: Training_Set is training."""
    return name.lower().removesuffix("set").rstrip("_- ")


@dataclass(frozen=True)
class FolderSource:
    """A data set in a folder.

    Attributes:
        name: the data set, for messages.
        root: its folder.
        names: class names, see `words.named`; None for `classnames.txt` in the folder, if any.
    """

    name: str
    root: Path
    names: Names = None

    def _layout(self) -> tuple[dict[str, Path], list[str]]:
        """The folder of each split ("all" for a folder that is not split), and the classes."""
        names = class_folders(self.root)
        if not names:
            raise MissingFileError(
                f"data set {self.name}: {self.root} has no folders; expected one folder of images "
                "per class, or train/ and test/ with these"
            )
        split = [name for name in names if class_folders(self.root / name)]  # not "train", a class
        parts = split_names(split, self.name)
        self._check([name for name in names if name not in parts.values()], bool(parts))
        splits = {ours: self.root / theirs for ours, theirs in parts.items()} or {"all": self.root}
        return splits, class_folders(splits.get("train", self.root))

    def _check(self, rest: list[str], split: bool) -> None:
        """Warns of pictures beside the splits, and refuses splits of unknown names.

        Args:
            rest: the folders that are no splits.
            split: whether others are.

        Raises:
            UsageError: if all folders have the same ones in them and no pictures, and the name of
                one is like that of a split.
        """
        if split and (beside := [name for name in rest if _has_pictures(self.root / name, "*")]):
            logger.warning(
                "%s: the pictures in %s, beside its splits, are left out; classes belong in train/",
                self.name,
                ", ".join(map(shown, beside)),
            )
        words = {word for names in SPLITS.values() for word in names} | set(EVALUATED)
        if not any(word in name.lower() for name in rest for word in words):
            return
        inner = [set(class_folders(self.root / name)) for name in rest]
        widest = max(inner, key=len, default=set())
        if split or len(rest) < 2 or len(widest) < 2 or not all(each <= widest for each in inner):
            return
        if all(inner) and not any(_has_pictures(self.root / name, "*") for name in rest):
            raise UsageError(
                f"data set {self.name}: the folders {', '.join(map(shown, rest[:8]))} of "
                f"{self.root} have the same folders in them; expected classes, or the splits train "
                "and test. Rename them if they are splits; if they are classes, list the pictures "
                "in a table"
            )

    def _phrases(self, classes: list[str]) -> tuple[str, ...]:
        beside = self.root / CLASSNAMES
        names = beside if self.names is None and beside.is_file() else self.names
        return named(self.name, classes, names)

    def classnames(self, location: Path) -> tuple[str, ...]:
        """The class names; lists no images."""
        return self._phrases(self._layout()[1])

    def __call__(self, location: Path) -> Splits:
        """Lists the images.

        Raises:
            MissingFileError: if a folder or the images of a class are missing.
            UsageError: if a split has a class that the training images lack.
        """
        folders, classes = self._layout()
        read = {split: self._read(folder, classes) for split, folder in folders.items()}
        train = read.get("train") or read["all"]
        splits = Splits(train, read.get("test", train), self._phrases(classes), read.get("val"))
        if "test" in read:
            return splits
        labels = [label for _, label in train.samples]
        return with_test_part(self.name, splits, labels, _keys(train))

    def _read(self, folder: Path, classes: list[str]) -> ListedPictures:
        """The images of a split; those of testing may lack classes."""
        pictures = class_pictures(folder)
        if extra := sorted(set(pictures.classes) - set(classes)):
            remedy = "remove them, or add training images"
            raise untrained(self.name, folder, "the training images", extra, remedy)
        labels = [classes.index(name) for name in pictures.classes]
        samples = [(path, labels[label]) for path, label in pictures.samples]
        return ListedPictures(samples, classes, folder)


def _has_pictures(folder: Path, pattern: str) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.glob(pattern))


def _keys(pictures: ListedPictures) -> list[str]:
    root = pictures.root
    return [Path(path).relative_to(root).as_posix() for path, _ in pictures.samples]
