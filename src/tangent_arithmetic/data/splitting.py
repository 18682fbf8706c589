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
    """The indices of examples whose content another one has, too, where none has to be decoded."""
    if isinstance(pictures, SubsetPictures):
        inner = copies_of(pictures.pictures)
        return {i for i, index in enumerate(pictures.indices) if int(index) in inner}
    samples = samples_of(pictures)
    if samples and isinstance(samples[0][0], str | Path):
        return twins([str(path) for path, _ in samples])
    return repeated(digests_of(pictures) or ())


def repeated(contents: Sequence[Hashable]) -> set[int]:
    """The indices of what is there more than once."""
    counts = Counter(contents)
    return {index for index, content in enumerate(contents) if counts[content] > 1}


def twins(paths: Sequence[str]) -> set[int]:
    """The indices of files whose content another one has, too; broken links are refused later."""
    sizes = [
        Path(path).stat().st_size if Path(path).exists() else f"none at {path}" for path in paths
    ]
    alike = sorted(repeated(sizes))  # others are not read
    contents = [hashlib.sha256(Path(paths[index]).read_bytes()).digest() for index in alike]
    return {alike[index] for index in repeated(contents)}


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
        raise UsageError(
            f"data set {name}: {len(keys)} image{'' if len(keys) == 1 else 's'}, at most one (not "
            "counting copies) of each class, cannot be split into a training and a test part. Add "
            "images, or give it a test split"
        )
    logger.info(
        "%s: no test split; a fifth of each class is for testing: %d training and %d test examples",
        name,
        len(train),
        len(test),
    )
    return replace(splits, train=SubsetPictures(whole, train), test=SubsetPictures(whole, test))
