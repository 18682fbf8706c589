"""The test part of data that come in one piece, and which of them are there twice.

It is a fifth of each class, rounded, and at least one image of a class that has two: the images
whose keys have the smallest SHA-256. A key is a path relative to the data set, or a row's number.
The rule needs no random generator, so that the part is the same on every machine and with every
version of a library, and an image that is added later moves few others. What is there twice is for
training: tested on, its copy among the training images would have told the answer.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from tangent_arithmetic.data.base import Pictures, Splits, SubsetPictures
from tangent_arithmetic.data.files import samples_of
from tangent_arithmetic.data.leaks import digests_of
from tangent_arithmetic.data.texts import Texts
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)

PART = 5  # one image of so many is for testing


def split_off(
    keys: Sequence[str], strata: Sequence[Hashable], trained: Collection[int] = ()
) -> tuple[list[int], list[int]]:
    """The indices of the training and the test part, each in order.

    Args:
        keys: a text for each image, different for different images.
        strata: the class of each image; all the same to draw from all images together.
        trained: indices of images that must be for training.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, stratum in enumerate(strata):
        members[stratum].append(index)
    test: set[int] = set()
    for indices in members.values():
        count = max(1, (2 * len(indices) + PART) // (2 * PART)) if len(indices) > 1 else 0
        free = [index for index in indices if index not in trained]
        test.update(sorted(free, key=lambda index: _rank(keys[index]))[:count])
    return [i for i in range(len(keys)) if i not in test], sorted(test)


def _rank(key: str) -> tuple[bytes, str]:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest(), key


def copies_of(pictures: Pictures) -> set[int]:
    """The indices of examples whose content another one has, too, see `originals_of`."""
    originals = originals_of(pictures)
    return {*originals, *originals.values()}


def originals_of(pictures: Pictures) -> dict[int, int]:
    """For each example that an earlier one has the content of, the first such; by index.

    Where contents would have to be decoded, it is empty.
    """
    first: dict[Hashable, int] = {}
    contents = enumerate(_contents(pictures))
    return {i: first[key] for i, key in contents if first.setdefault(key, i) != i}


def _contents(pictures: Pictures) -> Sequence[Hashable]:
    """A key for each example that examples of the same content share; none if unknown."""
    if isinstance(pictures, SubsetPictures):
        inner = _contents(pictures.pictures)
        return inner and [inner[int(index)] for index in pictures.indices]
    samples = samples_of(pictures)
    if samples and isinstance(samples[0][0], str | Path):
        return _of_files([str(path) for path, _ in samples])
    return digests_of(pictures) or ()


def _of_files(paths: Sequence[str]) -> list[Hashable]:
    """A key for each file that equal files share; broken links are refused later."""
    sizes = [Path(path).stat().st_size if Path(path).exists() else path for path in paths]
    counts = Counter(sizes)
    return [  # a file whose size is unique is not read
        _digest(path) if counts[size] > 1 else path for path, size in zip(paths, sizes, strict=True)
    ]


def _digest(path: str) -> Hashable:
    """A hash of a file's content; its path if it cannot be read, which is refused later."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest()
    except OSError:
        return path


def with_test_part(
    name: str, splits: Splits, strata: Sequence[Hashable], keys: Sequence[str] | None = None
) -> Splits:
    """The splits with a test part of the training images; says so in the log.

    Examples whose content is there twice are for training, see `copies_of`.

    Args:
        name: the data set, for messages.
        splits: `test` is not used.
        strata: see `split_off`, of the training examples.
        keys: likewise; None for their numbers. Those of texts are the texts.

    Raises:
        UsageError: if no class has two images.
    """
    whole: Pictures = splits.train
    copies = copies_of(whole)
    if isinstance(whole, Texts):
        keys = whole.texts
    elif keys is None:
        keys = [str(index) for index in range(len(whole))]
    if copies:
        logger.warning(
            "%s: %d examples have the content of another one, such as %s; they are for training",
            name,
            len(copies),
            keys[min(copies)],
        )
    train, test = split_off(keys, strata, copies)
    if not test:
        one = "text" if isinstance(whole, Texts) else "image"
        raise UsageError(
            f"data set {name}: {len(keys)} {one}{'' if len(keys) == 1 else 's'}, at most one (not "
            "counting copies) of each class, cannot be split into a training and a test part. Add "
            f"{one}s, or give it a test split"
        )
    logger.info(
        "%s: no test split; a fifth of each class is for testing: %d training and %d test examples",
        name,
        len(train),
        len(test),
    )
    return replace(splits, train=SubsetPictures(whole, train), test=SubsetPictures(whole, test))
