"""Where a public data set is looked for: the seeds' folders, torchvision's layouts, the hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tangent_arithmetic.data.base import WAY_OUT, Loader, Splits
from tangent_arithmetic.data.hub import HubSet, load_hub
from tangent_arithmetic.data.leaks import refuse_shared
from tangent_arithmetic.runtime.errors import MissingFileError, unknown

logger = logging.getLogger(__name__)

SOURCES = ("folder", "torchvision", "hub")  # in the order in which they are tried


@dataclass(frozen=True)
class Layout:
    """A way in which a data set lies below the data root.

    Attributes:
        load: reads it.
        paths: where it is, below the root; if one of them exists, the set is meant to be there.
    """

    load: Loader
    paths: tuple[str, ...]


@dataclass(frozen=True)
class PublicSet:
    """A data set and its sources.

    Attributes:
        folder: as the public projects lay it out.
        torchvision: as `torchvision.datasets` leaves it; "same" where that is the same layout, None
            where it does not have the set.
        hub: on the Hugging Face hub.
    """

    folder: Layout
    torchvision: Layout | Literal["same"] | None = None
    hub: HubSet | None = None

    def __call__(self, location: Path) -> Splits:
        """Reads the folders below `location`.

        Raises:
            UsageError: if two splits share pictures.
        """
        return refuse_shared(self.folder.load(location))


def load_public(name: str, entry: PublicSet, location: Path, source: str = "auto") -> Splits:
    """A data set from the first source that has it.

    Args:
        name: the data set.
        entry: its sources.
        location: the data root.
        source: one of `SOURCES`, or "auto" for all in that order. A set that lies below the root
            but is not complete is an error, not a reason to go on.

    Raises:
        MissingFileError: if no source has it, saying what each looked for.
        UsageError: if a source has it, but not as it should be, or with pictures in two splits.
    """
    if source not in ("auto", *SOURCES):
        raise unknown("data source", source, ("auto", *SOURCES))
    reasons = {}
    for kind in SOURCES if source == "auto" else (source,):
        try:
            found = _read(name, entry, location, kind)
        except MissingFileError as error:
            if _is_there(entry, location, kind):
                raise
            reasons[kind] = error
            continue
        refuse_shared(found)
        if source == "auto" and kind != "folder":
            logger.info("data set %s: read from the source %s (--data-source)", name, kind)
        return found
    if len(reasons) == 1:
        raise next(iter(reasons.values()))
    looked = [f"{kind}: {str(error).removesuffix(WAY_OUT)}" for kind, error in reasons.items()]
    raise MissingFileError(
        f"data set {name} is in none of the places where it was looked for.\n  "
        + "\n  ".join(looked)
        + f"\nWay out: one of these.{WAY_OUT}"
    )


def _read(name: str, entry: PublicSet, location: Path, kind: str) -> Splits:
    if kind == "hub":
        if entry.hub is None:
            raise MissingFileError(f"data set {name} is not offered from the hub")
        return replace(load_hub(name, entry.hub), source="hub")
    if kind == "folder" or entry.torchvision == "same":
        return replace(entry.folder.load(location), source="folder")
    if entry.torchvision is None:
        raise MissingFileError(f"data set {name} is not one of torchvision's")
    return replace(entry.torchvision.load(location), source="torchvision")


def _is_there(entry: PublicSet, location: Path, kind: str) -> bool:
    layout = {"folder": entry.folder, "torchvision": entry.torchvision}.get(kind)
    return isinstance(layout, Layout) and any((location / path).exists() for path in layout.paths)
