"""RESISC45: 45 kinds of scenes from the air, with published lists of the splits.

Source: Cheng et al., "Remote sensing image scene classification: benchmark and state of the art",
2017 (arXiv:1703.00121); splits of Neumann et al., 2019 (arXiv:1911.06721).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from src.data.base import Splits, require
from src.data.clip8.folders import ClassFolders, listed, spaced
from src.errors import MissingFileError, UsageError

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

CLASSES = listed(
    """
    airplane, airport, baseball diamond, basketball court, beach, bridge, chaparral, church,
    circular farmland, cloud, commercial area, dense residential, desert, forest, freeway, golf
    course, ground track field, harbor, industrial area, intersection, island, lake, meadow, medium
    residential, mobile home park, mountain, overpass, palace, parking lot, railway, railway
    station, rectangular farmland, river, roundabout, runway, sea ice, ship, snowberg, sparse
    residential, stadium, storage tank, tennis court, terrace, thermal power station, wetland
    """
)
FOLDERS = ClassFolders(
    "RESISC45",
    "resisc45/ with NWPU-RESISC45/<class>/*.jpg and resisc45-{train,test}.txt, one file name a "
    "line, for instance airplane_001.jpg",
    45,
    r"[a-z]+(_[a-z]+)*",
)


def load(location: Path) -> Splits:
    """Reads `resisc45/` below `location`.

    The published list `resisc45-val.txt` is left aside, as in the public projects: their RESISC45
    validation pictures are a part of the training list.
    """
    root = location / "resisc45"
    train, test = (read_list(root, f"resisc45-{split}.txt") for split in ("train", "test"))
    return Splits(train, test, tuple(spaced(name) for name in train.classes))


def read_list(root: Path, list_name: str) -> ImageFolder:
    """The pictures that one list names.

    Args:
        root: the folder `resisc45`.
        list_name: of the list in it.

    Raises:
        MissingFileError: if the list or one of its pictures is missing.
        UsageError: if the list names a class without a folder.
    """
    classes = FOLDERS.check(root / "NWPU-RESISC45")
    listing = require(root / list_name, FOLDERS.name, FOLDERS.layout)
    names = listing.read_text(encoding="utf-8").split()
    wanted = {f"{name.rpartition('_')[0]}/{name}" for name in names}
    if strange := sorted({name.partition("/")[0] for name in wanted} - set(classes)):
        raise UsageError(
            f"data set RESISC45: {listing} names classes that have no folder in "
            f"{root / 'NWPU-RESISC45'}: {', '.join(map(repr, strange[:5]))}; expected lines such "
            "as airplane_001.jpg"
        )
    pictures = FOLDERS.pictures(
        root / "NWPU-RESISC45", lambda path: "/".join(Path(path).parts[-2:]) in wanted
    )
    found = {"/".join(Path(path).parts[-2:]) for path, _ in pictures.samples}
    if missing := sorted(wanted - found):
        raise MissingFileError(
            f"data set RESISC45 is not complete: of the {len(wanted)} pictures in {listing}, "
            f"{len(missing)} are not in {root / 'NWPU-RESISC45'}, the first {missing[0]}. Expected "
            f"below --data-location: {FOLDERS.layout}."
        )
    return pictures
