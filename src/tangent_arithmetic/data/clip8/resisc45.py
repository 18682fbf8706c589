"""RESISC45: 45 types of aerial scenes, with published lists of the splits.

Source: Cheng et al., "Remote sensing image scene classification: benchmark and state of the art",
2017 (arXiv:1703.00121); splits of Neumann et al., 2019 (arXiv:1911.06721).
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits, require
from tangent_arithmetic.data.clip8.folders import ClassFolders, listed, spaced
from tangent_arithmetic.data.files import ListedPictures
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError, shown
from tangent_arithmetic.storage.reading import read_text

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

    The published list `resisc45-val.txt` is not used: as in the public projects, validation images
    are held out from the training list.
    """
    root = location / "resisc45"
    pictures = _pictures(root)
    train, test = (_chosen(root / f"resisc45-{split}.txt", pictures) for split in ("train", "test"))
    return Splits(train, test, tuple(spaced(name) for name in train.classes))


def read_list(root: Path, list_name: str) -> ListedPictures:
    """The images of one list.

    Args:
        root: the folder `resisc45`.
        list_name: file name of the list in it.

    Raises:
        MissingFileError: if the list or one of its images is missing.
        UsageError: if the list cannot be read or names a class without a folder.
    """
    return _chosen(root / list_name, _pictures(root))


def _pictures(root: Path) -> ListedPictures:
    FOLDERS.check(root / "NWPU-RESISC45")
    return FOLDERS.pictures(root / "NWPU-RESISC45")


def _chosen(listing: Path, pictures: ListedPictures) -> ListedPictures:
    names = read_text(require(listing, FOLDERS.name, FOLDERS.layout)).split()
    wanted = {f"{name.rpartition('_')[0]}/{name}" for name in names}
    if unknown := sorted({name.partition("/")[0] for name in wanted} - set(pictures.classes)):
        raise UsageError(
            f"data set RESISC45: {listing} names classes without a folder in {pictures.root}: "
            f"{', '.join(repr(shown(name)) for name in unknown[:5])}; expected lines such as "
            "airplane_001.jpg"
        )
    samples = {"/".join(Path(path).parts[-2:]): (path, label) for path, label in pictures.samples}
    if missing := sorted(wanted - samples.keys()):
        raise MissingFileError(
            f"data set RESISC45 is not complete: of the {len(wanted)} images in {listing}, "
            f"{len(missing)} are not in {pictures.root}, the first {shown(missing[0])}. Expected "
            f"below --data-location: {FOLDERS.layout}."
        )
    listed_samples = [sample for name, sample in samples.items() if name in wanted]
    return ListedPictures(listed_samples, pictures.classes, pictures.root).with_every_class()
