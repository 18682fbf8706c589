"""Food101: 101 dishes.

Source: Bossard et al., "Food-101: mining discriminative components with random forests", ECCV 2014.
"""

from __future__ import annotations

from pathlib import Path

from tangent_arithmetic.data.base import Splits, require
from tangent_arithmetic.data.clip8.folders import ClassFolders, listed, read_checked, spaced
from tangent_arithmetic.data.files import ListedPictures, require_files
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.reading import inside, read_json

# In the order of the folders, which is that of OpenAI's prompts for CLIP.
CLASSES = listed(
    """
    apple pie, baby back ribs, baklava, beef carpaccio, beef tartare, beet salad, beignets,
    bibimbap, bread pudding, breakfast burrito, bruschetta, caesar salad, cannoli, caprese salad,
    carrot cake, ceviche, cheese plate, cheesecake, chicken curry, chicken quesadilla, chicken
    wings, chocolate cake, chocolate mousse, churros, clam chowder, club sandwich, crab cakes, creme
    brulee, croque madame, cup cakes, deviled eggs, donuts, dumplings, edamame, eggs benedict,
    escargots, falafel, filet mignon, fish and chips, foie gras, french fries, french onion soup,
    french toast, fried calamari, fried rice, frozen yogurt, garlic bread, gnocchi, greek salad,
    grilled cheese sandwich, grilled salmon, guacamole, gyoza, hamburger, hot and sour soup, hot
    dog, huevos rancheros, hummus, ice cream, lasagna, lobster bisque, lobster roll sandwich,
    macaroni and cheese, macarons, miso soup, mussels, nachos, omelette, onion rings, oysters, pad
    thai, paella, pancakes, panna cotta, peking duck, pho, pizza, pork chop, poutine, prime rib,
    pulled pork sandwich, ramen, ravioli, red velvet cake, risotto, samosa, sashimi, scallops,
    seaweed salad, shrimp and grits, spaghetti bolognese, spaghetti carbonara, spring rolls, steak,
    strawberry shortcake, sushi, tacos, takoyaki, tiramisu, tuna tartare, waffles
    """
)
FOLDERS = ClassFolders(
    "Food101",
    "[food101/]food-101/ with images/<dish>/*.jpg and meta/{train,test}.json",
    len(CLASSES),
    "|".join(name.replace(" ", "_") for name in CLASSES),
)


def load(location: Path) -> Splits:
    """Reads `food-101/` below `location`, in the order of its lists.

    Raises:
        MissingFileError: if a list or a listed image is missing.
        UsageError: if the classes are not as expected, or a list is damaged.
    """
    root = location / "food-101"
    folders = FOLDERS.check(root / "images")
    train, test = (_listed(root, split, folders) for split in ("train", "test"))
    return Splits(train, test, tuple(map(spaced, folders)))


def _listed(root: Path, split: str, folders: list[str]) -> ListedPictures:
    table = require(root / "meta" / f"{split}.json", FOLDERS.name, FOLDERS.layout)
    listing, images = read_json(table), root / "images"
    if set(listing) != set(folders):
        strange = sorted(set(listing) ^ set(folders))
        raise UsageError(
            f"data set Food101: {table} must list the {len(folders)} folders of {images}, but "
            f"these are in one only: {', '.join(strange[:5])}"
        )
    labels = {folder: label for label, folder in enumerate(folders)}
    samples = read_checked(
        "Food101",
        table,
        lambda: [
            (str(images / inside(table, f"{name}.jpg")), labels[folder])
            for folder, names in listing.items()
            for name in names
        ],
    )
    require_files((path for path, _ in samples), table, FOLDERS.name)
    return ListedPictures(samples, folders, images).with_every_class()
