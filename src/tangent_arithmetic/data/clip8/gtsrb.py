"""GTSRB: 43 German traffic signs.

Source: Stallkamp et al., "The German traffic sign recognition benchmark", IJCNN 2011.
"""

from __future__ import annotations

import csv
from pathlib import Path

from tangent_arithmetic.data.base import Splits, require
from tangent_arithmetic.data.clip8.folders import ClassFolders, listed, read_checked
from tangent_arithmetic.data.files import ListedPictures, is_hidden, require_files
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.reading import inside, read_text

# The wording, and the spelling, of OpenAI's prompts for CLIP, in the order of the labels.
CLASSES = listed(
    """
    red and white circle 20 kph speed limit, red and white circle 30 kph speed limit, red and white
    circle 50 kph speed limit, red and white circle 60 kph speed limit, red and white circle 70 kph
    speed limit, red and white circle 80 kph speed limit, end / de-restriction of 80 kph speed
    limit, red and white circle 100 kph speed limit, red and white circle 120 kph speed limit, red
    and white circle red car and black car no passing, red and white circle red truck and black car
    no passing, red and white triangle road intersection warning, white and yellow diamond priority
    road, red and white upside down triangle yield right-of-way, stop, empty red and white circle,
    red and white circle no truck entry, red circle with white horizonal stripe no entry, red and
    white triangle with exclamation mark warning, red and white triangle with black left curve
    approaching warning, red and white triangle with black right curve approaching warning, red and
    white triangle with black double curve approaching warning, red and white triangle rough / bumpy
    road warning, red and white triangle car skidding / slipping warning, red and white triangle
    with merging / narrow lanes warning, red and white triangle with person digging / construction /
    road work warning, red and white triangle with traffic light approaching warning, red and white
    triangle with person walking warning, red and white triangle with child and person walking
    warning, red and white triangle with bicyle warning, red and white triangle with snowflake / ice
    warning, red and white triangle with deer warning, white circle with gray strike bar no speed
    limit, blue circle with white right turn arrow mandatory, blue circle with white left turn arrow
    mandatory, blue circle with white forward arrow mandatory, blue circle with white forward or
    right turn arrow mandatory, blue circle with white forward or left turn arrow mandatory, blue
    circle with white keep right arrow mandatory, blue circle with white keep left arrow mandatory,
    blue circle with white arrows indicating a traffic circle, white circle with gray strike bar
    indicating no passing for cars has ended, white circle with gray strike bar indicating no
    passing for trucks has ended
    """
)
LAYOUT = (
    "gtsrb/ with GTSRB/Training/{00000,...,00042}/*.ppm, GTSRB/Final_Test/Images/*.ppm and "
    "GT-final_test.csv"
)
FOLDERS = ClassFolders("GTSRB", LAYOUT, len(CLASSES), r"000[0-3]\d|0004[0-2]")


def load(location: Path) -> Splits:
    """Reads `gtsrb/` below `location`.

    Raises:
        MissingFileError: if a file or folder is missing.
        UsageError: if there are not 43 classes, or the table of test labels does not match the test
            images.
    """
    folder = location / "gtsrb"
    table, images = folder / "GT-final_test.csv", folder / "GTSRB" / "Final_Test" / "Images"
    classes = FOLDERS.check(folder / "GTSRB" / "Training")
    for path in (images, table):
        require(path, "GTSRB", LAYOUT)
    train = FOLDERS.pictures(folder / "GTSRB" / "Training")
    samples = read_checked("GTSRB", folder, lambda: _listed(table, images))
    names = [path.name for path in images.glob("*.ppm") if not is_hidden(path.name)]
    if len(samples) != len(names):
        raise UsageError(
            f"data set GTSRB: {table} lists {len(samples)} images, but {images} holds "
            f"{len(names)}; both must be complete (12,630 in the published set)"
        )
    require_files((path for path, _ in samples), table, "GTSRB")
    return Splits(train, ListedPictures(samples, classes, images), CLASSES)


def _listed(table: Path, images: Path) -> list[tuple[str, int]]:
    """Path and label of the images in the table, which has a header and semicolons."""
    rows = csv.DictReader(read_text(table).splitlines(), delimiter=";", skipinitialspace=True)
    return [(str(images / inside(table, row["Filename"])), int(row["ClassId"])) for row in rows]
