"""Pictures that are in two splits, by which an accuracy would mean nothing."""

from __future__ import annotations

import contextlib
import filecmp
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from itertools import combinations
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from tangent_arithmetic.data.base import Pictures, Splits, name_of
from tangent_arithmetic.data.hub import HubPictures
from tangent_arithmetic.runtime.errors import UsageError

HEAD = 1024  # bytes of a file by which candidates are told apart before they are compared whole


def refuse_shared(splits: Splits) -> Splits:
    """The splits, if no two of them share pictures as far as that can be told cheaply.

    Files with the same name, wherever they lie, are compared by content; those under other names
    are for `scripts/prepare_data.py`, which reads all. Pictures in arrays and rows of a hub are
    compared all, and refused if most of a split is in another: a few are in some published sets.

    Raises:
        UsageError: if two splits share pictures; it names two.
    """
    parts = [part for part in (splits.train, splits.val, splits.test) if part is not None]
    for one, other in combinations(parts, 2):
        refuse_pair(one, other)
    return splits


def refuse_pair(one: Pictures, other: Pictures) -> None:
    """Raises a UsageError if two splits share pictures; see `refuse_shared`.

    Splits of different kinds, and one that is only listed when it is used, are passed over.
    """
    files, others = _files(one), _files(other)
    if files is not None and others is not None:
        _refuse_files(files, others)
    elif files is None and others is None:
        _refuse_contents(one, other)


def _refuse_files(files: list[str], others: list[str]) -> None:
    names = {PurePath(path).name for path in files} & {PurePath(path).name for path in others}
    candidates: dict[Hashable, list[str]] = defaultdict(list)
    for path, facts in _named(files, names):
        candidates[facts].append(path)
    for copy, facts in _named(others, names):
        for path in candidates.get(facts, ()):
            if filecmp.cmp(path, copy, shallow=False):
                raise _shared(path, copy, "")


def _named(paths: Iterable[str], names: set[str]) -> Iterator[tuple[str, Hashable]]:
    """The files with one of these names, and what tells most of them apart."""
    for path in paths:
        name = PurePath(path).name
        if name in names:
            with contextlib.suppress(OSError):  # is said when the picture is read
                size = Path(path).stat().st_size
                with Path(path).open("rb") as file:
                    yield path, (name, size, file.read(HEAD))


def _refuse_contents(one: Pictures, other: Pictures) -> None:
    digests, others = _digests(one), _digests(other)
    if digests is None or others is None:
        return
    places = {digest: index for index, digest in enumerate(digests)}
    shared = [(places[d], index) for index, d in enumerate(others) if d in places]
    if 2 * len(shared) > min(len(digests), len(others)):
        first, copy = shared[0]
        raise _shared(name_of(one, first), name_of(other, copy), f" ({len(shared)} are)")


def _shared(one: str, other: str, count: str) -> UsageError:
    return UsageError(
        f"{one} and {other} are one picture in two splits{count}, so that the accuracy on it would "
        "mean nothing. Make the splits again without overlap"
    )


def _files(pictures: Any) -> list[str] | None:
    samples = getattr(pictures, "samples", None) or getattr(pictures, "_samples", None)
    return None if samples is None else [str(path) for path, _ in samples]


def _digests(pictures: Any) -> list[Hashable] | None:
    """Something of each picture that differs where pictures do."""
    if isinstance(pictures, HubPictures):
        return pictures.digests()
    data = getattr(pictures, "images", getattr(pictures, "data", None))
    return None if data is None else [hash(row.tobytes()) for row in np.asarray(data)]
