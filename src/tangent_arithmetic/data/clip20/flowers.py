"""Flowers102: 102 types of flowers. Ten images of each are for training.

Source: Nilsback and Zisserman, "Automated flower classification over a large number of classes",
ICVGIP 2008.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits
from tangent_arithmetic.data.clip8.folders import listed, read_checked, require_all
from tangent_arithmetic.data.files import ListedPictures, require_files
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.matlab import read_table

# The wording, and the order of the labels, of OpenAI's prompts for CLIP.
CLASSES = listed(
    """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger
    lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king
    protea, spear thistle, yellow iris, globe flower, purple coneflower, peruvian lily, balloon
    flower, giant white arum lily, fire lily, pincushion flower, fritillary, red ginger, grape
    hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william,
    carnation, garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped
    cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, daffodil,
    sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common
    dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura,
    geranium, orange dahlia, pink and yellow dahlia, cautleya spicata, japanese anemone, black-eyed
    susan, silverbush, californian poppy, osteospermum, spring crocus, bearded iris, windflower,
    tree poppy, gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower,
    lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose, tree
    mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, air plant, foxglove,
    bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper,
    blackberry lily
    """
)
LISTS = ("trnid", "tstid")  # variables of setid.mat: the training and the test images
# the names that torchvision and others have for some
OTHER_NAMES = {"ball moss": "air plant", "pink-yellow dahlia": "pink and yellow dahlia"}
FILES = ("jpg", "imagelabels.mat", "setid.mat")
LAYOUT = "[flowers102/]flowers-102/ with jpg/image_*.jpg, imagelabels.mat and setid.mat"


def load(location: Path) -> Splits:
    """Reads `flowers-102/` below `location`, in the order of its lists.

    The published validation list is not used: as in the public projects, validation images are held
    out from the training list.

    Raises:
        MissingFileError: if a table or a listed image is missing.
        UsageError: if a table is damaged.
    """
    root = location / "flowers-102"
    require_all("Flowers102", root, FILES, LAYOUT)
    labels = _numbers(root / "imagelabels.mat", "labels")
    train, test = (_listed(root, variable, labels) for variable in LISTS)
    return Splits(train, test, CLASSES)


def _listed(root: Path, variable: str, labels: list[int]) -> ListedPictures:
    """The images of one list; images and labels count from one."""
    table, images = root / "setid.mat", root / "jpg"
    numbers = _numbers(table, variable)
    strange = [n for n in numbers if not 1 <= n <= len(labels)]
    strange += [n for n in labels if not 1 <= n <= len(CLASSES)]
    if strange:
        raise UsageError(
            f"data set Flowers102: {table} and imagelabels.mat beside it must number "
            f"{len(labels)} images and {len(CLASSES)} classes, got {strange[0]}; fetch them again"
        )
    samples = [(str(images / f"image_{n:05d}.jpg"), labels[n - 1] - 1) for n in numbers]
    require_files((path for path, _ in samples), table, "Flowers102")
    return ListedPictures(samples, list(CLASSES), images).with_every_class()


def _numbers(table: Path, variable: str) -> list[int]:
    rows = read_table(table, variable)
    return read_checked("Flowers102", table, lambda: [int(number) for (number,) in rows])
