"""Detection of examples that are in two splits and would make an accuracy meaningless."""

from __future__ import annotations

import contextlib
import filecmp
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import combinations
from pathlib import Path, PurePath

import numpy as np

from tangent_arithmetic.data.base import Pictures, Splits, name_of
from tangent_arithmetic.data.files import LazyPictures, samples_of
from tangent_arithmetic.data.hub import HubPictures
from tangent_arithmetic.data.texts import Texts
from tangent_arithmetic.runtime.errors import UsageError

logger = logging.getLogger(__name__)

HEAD = 1024  # bytes of a file compared first, before whole files


def refuse_shared(splits: Splits) -> Splits:
    """Returns the splits if they share no images, as far as this can be checked cheaply.

    Files with the same name are compared by content; `tangent-arithmetic prepare-data` compares all
    files. Texts, images in arrays and rows of the hub are all compared. They are refused only if
    more than half of a split is in another, since some published sets share a few; fewer are a
    warning.

    Raises:
        UsageError: if two splits share images or texts; the message names a pair.
    """
    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    for one, other in combinations(parts, 2):
        refuse_pair(one, other)
    return splits


def refuse_pair(one: Pictures, other: Pictures) -> None:
    """Raises a UsageError if two splits share images; see `refuse_shared`.

    Splits of different types, and lazily listed ones, are not compared.
    """
    if isinstance(one, LazyPictures) or isinstance(other, LazyPictures):
        return
    files, others = samples_of(one), samples_of(other)
    if files is not None and others is not None:
        _compare_files([str(path) for path, _ in files], [str(path) for path, _ in others])
    elif files is None and others is None:
        _compare_contents(one, other)


def _compare_files(files: list[str], others: list[str]) -> None:
    names = {PurePath(path).name for path in files} & {PurePath(path).name for path in others}
    candidates: dict[Hashable, list[str]] = defaultdict(list)
    for path, facts in _named(files, names):
        candidates[facts].append(path)
    for copy, facts in _named(others, names):
        for path in candidates.get(facts, ()):
            if filecmp.cmp(path, copy, shallow=False):
                raise _shared(path, copy)


def _named(paths: Iterable[str], names: set[str]) -> Iterator[tuple[str, Hashable]]:
    """The files with one of these names, each with a cheap key that equal files share."""
    for path in paths:
        name = PurePath(path).name
        if name in names:
            with contextlib.suppress(OSError):  # reported when the image is read
                size = Path(path).stat().st_size
                with Path(path).open("rb") as file:
                    yield path, (name, size, file.read(HEAD))


def _compare_contents(one: Pictures, other: Pictures) -> None:
    digests, others = digests_of(one), digests_of(other)
    if digests is None or others is None:
        return
    places = {digest: index for index, digest in enumerate(digests)}
    shared = [(places[d], index) for index, d in enumerate(others) if d in places]
    if not shared:
        return
    first, copy = shared[0]
    names = name_of(one, first), name_of(other, copy)
    if 2 * len(shared) > min(len(digests), len(others)):
        kind = "text" if isinstance(one, Texts) else "image"
        raise _shared(*names, kind, f" (of {len(shared)})")
    logger.warning(
        "%d of the %d examples of a split are in another, such as %s and %s; an accuracy on them "
        "says little",
        len(shared),
        len(others),
        *names,
    )


def _shared(one: str, other: str, kind: str = "image", count: str = "") -> UsageError:
    return UsageError(
        f"{one} and {other} are the same {kind} in two splits{count}, which would make the "
        "accuracy meaningless. Create the splits again without overlap"
    )


def digests_of(pictures: Pictures) -> list[Hashable] | None:
    """A key per image that differs between different images; None if it is unknown.

    That of files is unknown: they are compared by name and content.
    """
    if isinstance(pictures, HubPictures | Texts):
        return pictures.digests()
    data = getattr(pictures, "images", getattr(pictures, "data", None))
    return None if data is None else [hash(row.tobytes()) for row in np.asarray(data)]
