"""Oxford-IIIT Pets: 37 breeds of cats and dogs.

Source: Parkhi et al., "Cats and dogs", CVPR 2012.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits, require
from tangent_arithmetic.data.clip8.folders import listed, read_checked
from tangent_arithmetic.data.files import ListedPictures, require_files
from tangent_arithmetic.storage.reading import inside, read_text

# In the order of the labels, in capitals as torchvision writes them.
CLASSES = listed(
    """
    Abyssinian, American Bulldog, American Pit Bull Terrier, Basset Hound, Beagle, Bengal, Birman,
    Bombay, Boxer, British Shorthair, Chihuahua, Egyptian Mau, English Cocker Spaniel, English
    Setter, German Shorthaired, Great Pyrenees, Havanese, Japanese Chin, Keeshond, Leonberger, Maine
    Coon, Miniature Pinscher, Newfoundland, Persian, Pomeranian, Pug, Ragdoll, Russian Blue, Saint
    Bernard, Samoyed, Scottish Terrier, Shiba Inu, Siamese, Sphynx, Staffordshire Bull Terrier,
    Wheaten Terrier, Yorkshire Terrier
    """
)
LAYOUT = "[OxfordIIITPet/]oxford-iiit-pet/ with images/*.jpg and annotations/{trainval,test}.txt"


def load(location: Path) -> Splits:
    """Reads `oxford-iiit-pet/` below `location`, in the order of its lists.

    Raises:
        MissingFileError: if a list or a listed image is missing.
        UsageError: if a list is damaged.
    """
    root = location / "oxford-iiit-pet"
    require(root / "images", "OxfordIIITPet", LAYOUT)
    train, test = (_listed(root, split) for split in ("trainval", "test"))
    return Splits(train, test, CLASSES)


def _listed(root: Path, split: str) -> ListedPictures:
    table = require(root / "annotations" / f"{split}.txt", "OxfordIIITPet", LAYOUT)
    images = root / "images"
    samples = read_checked("OxfordIIITPet", table, lambda: _samples(table, images))
    require_files((path for path, _ in samples), table, "OxfordIIITPet")
    return ListedPictures(samples, list(CLASSES), images).with_every_class()


def _samples(table: Path, images: Path) -> list[tuple[str, int]]:
    """Path and label of each image; a line is its name, and three numbers of which one is used.

    Raises:
        ValueError: if a label, which counts from one, is not that of the breed in the name.
    """
    samples = []
    for line in read_text(table).splitlines():
        name, number, _, _ = line.split()
        label = int(number) - 1
        breed = name.rpartition("_")[0].replace("_", " ").title()
        if not 0 <= label < len(CLASSES) or breed != CLASSES[label]:
            raise ValueError(f"{name} has the class {number}, which is not its breed")
        samples.append((str(images / inside(table, f"{name}.jpg")), label))
    return samples
