"""EuroSAT: ten types of land use in Sentinel-2 images (RGB). It has a validation split.

Source: Helber et al., "EuroSAT: a novel dataset and deep learning benchmark for land use and land
cover classification", 2019 (arXiv:1709.00029).
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import ClassFolders
from tangent_arithmetic.runtime.errors import MissingFileError

PHRASES = {  # folder -> the wording of OpenAI's prompts for CLIP
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
CLASSES = tuple(PHRASES.values())
FOLDERS = ClassFolders(
    "EuroSAT",
    "EuroSAT_splits/{train,val,test} with one folder of images per class",
    len(PHRASES),
    "|".join(PHRASES),
)


def load(location: Path) -> Splits:
    """Reads `EuroSAT_splits/{train,val,test}` below `location`."""
    root = location / "EuroSAT_splits"
    train, val, test = FOLDERS.read(root / "train", root / "val", root / "test")
    return Splits(train, test, tuple(PHRASES[name] for name in train.classes), val)


def load_torchvision(location: Path) -> Splits:
    """Raises an error, since torchvision's EuroSAT has no splits.

    Raises:
        MissingFileError: always.
    """
    raise MissingFileError(
        "data set EuroSAT: torchvision's eurosat/2750 has no training and test split, and results "
        "on an arbitrary one are not comparable with published ones. Expected: "
        f"{FOLDERS.layout}"
    )
