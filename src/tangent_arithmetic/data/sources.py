"""Sources of the public data sets: the public projects' folders, torchvision's layouts, the hub."""

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
    """A layout of a data set below the data root.

    Attributes:
        load: reads it.
        paths: its paths below the root; if one of them exists, the data set uses this layout.
    """

    load: Loader
    paths: tuple[str, ...]


@dataclass(frozen=True)
class PublicSet:
    """A data set and its sources.

    Attributes:
        folder: layout of the public projects.
        torchvision: layout of `torchvision.datasets`; "same" if it is that of the public projects,
            None if torchvision lacks the data set.
        hub: on the Hugging Face hub.
    """

    folder: Layout
    torchvision: Layout | Literal["same"] | None = None
    hub: HubSet | None = None

    def __call__(self, location: Path) -> Splits:
        """Reads the folders below `location`.

        Raises:
            UsageError: if two splits share images.
        """
        return refuse_shared(self.folder.load(location))


def load_public(name: str, entry: PublicSet, location: Path, source: str = "auto") -> Splits:
    """Reads a data set from the first source that has it.

    Args:
        name: the data set.
        entry: its sources.
        location: the data root.
        source: one of `SOURCES`, or "auto" for all in that order. An incomplete data set below the
            root is an error; the remaining sources are then not tried.

    Raises:
        MissingFileError: if no source has it; the message says where each looked.
        UsageError: if its files are invalid or its splits share images.
    """
    if source not in ("auto", *SOURCES):
        raise unknown("data source", source, ("auto", *SOURCES))
    reasons = {}
    for kind in SOURCES if source == "auto" else (source,):
        try:
            splits = _read(name, entry, location, kind)
        except MissingFileError as error:
            layout = _layout(entry, kind)
            if layout and any((location / path).exists() for path in layout.paths):
                raise
            reasons[kind] = error
            continue
        if source == "auto" and kind != "folder":
            logger.info("data set %s: read from the source %s (--data-source)", name, kind)
        return refuse_shared(splits)
    if len(reasons) == 1:
        raise next(iter(reasons.values()))
    lines = [f"  {kind}: {str(error).removesuffix(WAY_OUT)}" for kind, error in reasons.items()]
    raise MissingFileError(
        "\n".join([f"no source has data set {name}.", *lines, f"Provide one of these.{WAY_OUT}"])
    )


def _layout(entry: PublicSet, source: str) -> Layout | None:
    layouts = {"folder": entry.folder, "torchvision": entry.torchvision, "hub": None}
    layout = layouts[source]
    return entry.folder if layout == "same" else layout


def _read(name: str, entry: PublicSet, location: Path, source: str) -> Splits:
    if (layout := _layout(entry, source)) is not None:
        source = "folder" if layout is entry.folder else source
        return replace(layout.load(location), source=source)
    if source == "hub" and entry.hub is not None:
        return replace(load_hub(name, entry.hub), source=source)
    lacking = "available from the hub" if source == "hub" else "one of torchvision's"
    raise MissingFileError(f"data set {name} is not {lacking}")
