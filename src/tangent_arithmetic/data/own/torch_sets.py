"""Own data from Python: classes of `torchvision.datasets`, and functions of the user's."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.own.words import Names, given, named
from tangent_arithmetic.data.plain import plain_splits
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown, unknown

logger = logging.getLogger(__name__)

TRAIN = ("train", "trainval", "train-standard")  # values of torchvision's argument `split`
TEST = ("test", "val", "valid")  # where a set has no test split, val is for testing
VAL = ("val", "valid")


class _UnknownSplit(Exception):
    """A class of torchvision has no such split."""


@dataclass(frozen=True)
class TorchvisionSource:
    """A class of `torchvision.datasets`, with its data below the data root.

    Attributes:
        name: the data set, for messages.
        kind: name of the class.
        names: class names, see `words.named`; None for those of the class.
    """

    name: str
    kind: str
    names: Names = None

    def __call__(self, location: Path) -> Splits:
        """Reads the splits.

        Raises:
            MissingFileError: if the data are not below the data root; says how to fetch them.
            UsageError: if the class has no training split, or its items are no labelled images.
        """
        build, options = self._build(location)
        if "train" in options:
            parts = {"train": build(train=True), "test": build(train=False)}
        elif "split" in options:
            parts = self._by_split(build)
        else:
            parts = {"train": build()}
        names = self._names(parts["train"])
        return plain_splits(
            self.name, parts["train"], parts.get("test"), parts.get("val"), names, "torchvision"
        )

    def _build(self, location: Path) -> tuple[Any, set[str]]:
        from torchvision import datasets

        if self.kind not in datasets.__all__:
            raise unknown("class of torchvision.datasets", self.kind, datasets.__all__)
        found = getattr(datasets, self.kind)
        options = set(inspect.signature(found).parameters)
        if "root" not in options:
            raise UsageError(f"data set {self.name}: torchvision's {self.kind} reads no images")
        offline = {"download": False} if "download" in options else {}

        def build(**chosen: Any) -> Any:
            try:
                return found(root=str(location), **offline, **chosen)
            except Exception as error:  # each class has its own errors for missing files
                if isinstance(error, ValueError) and "Unknown value" in str(error):
                    raise _UnknownSplit from error
                raise self._missing(error, location, bool(offline), chosen) from error

        return build, options

    def _missing(
        self, error: Exception, location: Path, downloads: bool, chosen: Mapping[str, Any]
    ) -> MissingFileError:
        reason = shown(str(error).partition(" You can use download")[0].rstrip("."), 300)
        words = "".join(f", {name}={value!r}" for name, value in chosen.items())
        fetch = (
            f'fetch it with: python -c "from torchvision.datasets import {self.kind}; '
            f'{self.kind}({str(location)!r}{words}, download=True)"'
            if downloads
            else f"see the documentation of torchvision.datasets.{self.kind} for how to get it"
        )
        return MissingFileError(
            f"data set {self.name}: torchvision's {self.kind} cannot be read from {location} "
            f"({type(error).__name__}: {reason}). Name another root with --data-location, or "
            f"{fetch}"
        )

    def _by_split(self, build: Any) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        used = ""
        for ours, names in (("train", TRAIN), ("test", TEST), ("val", VAL)):
            for split in names:
                if split == used:  # val is for testing
                    continue
                try:
                    parts[ours] = build(split=split)
                except _UnknownSplit:
                    continue
                used = split
                break
        if "train" not in parts:
            raise UsageError(
                f"data set {self.name}: torchvision's {self.kind} has no training split; expected "
                f"one of {', '.join(TRAIN)}"
            )
        return parts

    def _names(self, train: Any) -> tuple[str, ...] | None:
        classes = getattr(train, "classes", None)
        if classes is not None and len(classes):
            return None if self.names is None else named(self.name, list(classes), self.names)
        if self.names is not None:
            return given(self.names)
        raise UsageError(
            f"data set {self.name}: torchvision's {self.kind} has no class names; name a file of "
            f"them, one a line in the order of the labels: "
            f"{self.name}=torchvision:{self.kind}?classnames=FILE"
        )


@dataclass(frozen=True)
class PythonSource:
    """What a function of the user's returns: `Splits`, or a mapping of data sets.

    Attributes:
        name: the data set, for messages.
        factory: `MODULE:FACTORY`, called without arguments, or with the data root if it takes one.
        names: class names, see `words.given`; None for those that it returns.
    """

    name: str
    factory: str
    names: Names = None

    def __call__(self, location: Path) -> Splits:
        """Calls the function.

        Raises:
            UsageError: if it cannot be imported or called, or returns something else.
        """
        from tangent_arithmetic.runtime.factories import imported

        made = self._called(imported(self.factory), location)
        if isinstance(made, Splits):
            return made
        if isinstance(made, tuple | list) and len(made) in (2, 3):
            made = dict(zip(("train", "test", "classnames"), made, strict=False))
        known = ("train", "test", "val", "classnames")
        if not isinstance(made, Mapping) or "train" not in made or not set(made) <= set(known):
            got = sorted(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
            raise UsageError(
                f"data set {self.name}: expected {self.factory} to return a mapping with train and "
                f"perhaps test, val and classnames, or (train, test[, classnames]); got {got}"
            )
        classnames = given(self.names) or made.get("classnames")
        parts = (made["train"], made.get("test"), made.get("val"))
        return plain_splits(self.name, *parts, classnames)

    def _called(self, factory: Any, location: Path) -> Any:
        try:
            takes = len(inspect.signature(factory).parameters)
            return factory(location) if takes else factory()
        except UsageError:
            raise
        except Exception as error:  # the user's code may raise anything
            reason = shown(f"{type(error).__name__}: {error}", 300)
            raise UsageError(f"data set {self.name}: {self.factory} failed ({reason})") from error
