"""Compares data sets on disk with the published ones: counts, shared images, unreadable files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import ChainMap, Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tangent_arithmetic.data.base import Pictures
from tangent_arithmetic.data.clip8 import dtd, eurosat, resisc45, sun397
from tangent_arithmetic.data.files import LazyPictures
from tangent_arithmetic.data.identity import fingerprint, labels_of
from tangent_arithmetic.data.prepare.contents import Finding, findings_of
from tangent_arithmetic.data.prepare.facts import SETS, Figure
from tangent_arithmetic.data.prepare.text.facts import TEXT_FACTS
from tangent_arithmetic.data.public import ALL_SETS
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError

FOLDER_SPLITS = {
    "DTD": (dtd.FOLDERS, {"train": "dtd/train", "test": "dtd/val"}),
    "EuroSAT": (
        eurosat.FOLDERS,
        {split: f"EuroSAT_splits/{split}" for split in ("train", "val", "test")},
    ),
    "SUN397": (sun397.FOLDERS, {"train": "sun397/train", "test": "sun397/val"}),
}

FACTS = ChainMap(SETS, TEXT_FACTS)
Verdict = Literal["good", "wrong", "missing"]


@dataclass
class Report:
    """The result for one data set.

    Attributes:
        name: the data set.
        verdict: "good", "wrong" or "missing".
        expected: published number of images, by split.
        found: number of images on disk, by split.
        shared: number of images in more than one split.
        unreadable: number of images that cannot be decoded.
        errors: messages that name the files concerned.
        notes: observations that are not errors.
        source: where the expected numbers are published.
    """

    name: str
    verdict: Verdict = "good"
    expected: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    unreadable: int = 0
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: str = ""

    @property
    def row(self) -> list[str]:
        """Its row in the table of results: name, sizes of splits, shared, unreadable, verdict."""
        cells = [self.name]
        for split in ("train", "val", "test"):
            expected, size = self.expected.get(split), self.found.get(split)
            shown = "?" if size is None else f"{size:,}"
            shown += "" if size == expected or expected is None else f" of {expected:,}"
            cells.append("-" if expected is None else shown)
        return [*cells, str(self.shared), str(self.unreadable), self.verdict]


def splits_of(name: str, root: Path) -> dict[str, Pictures]:
    """The images of every split on disk, even if splits share some.

    Raises:
        MissingFileError: if a file or folder is missing.
        UsageError: if classes or files are not as the loader expects.
    """
    if name in FOLDER_SPLITS:
        folders, paths = FOLDER_SPLITS[name]
        folders.check_same(root / path for path in paths.values())
        return {split: folders.pictures(root / path) for split, path in paths.items()}
    splits = ALL_SETS[name](root)
    pictures = {"train": splits.train, "test": splits.test}
    if name == "RESISC45":
        pictures["val"] = resisc45.read_list(root / "resisc45", "resisc45-val.txt")
    return pictures


def is_complete(name: str, root: Path) -> bool:
    """Whether every split exists with the published number of images."""
    try:
        sizes = {split: len(pictures) for split, pictures in splits_of(name, root).items()}
    except UsageError:
        return False
    return sizes == totals(name)


def verify(name: str, root: Path, num_workers: int = 1, thorough: bool = False) -> Report:
    """Verifies one data set; an unchanged data set is not read again.

    Args:
        name: the data set.
        root: the data root.
        num_workers: processes that read images.
        thorough: whether to read ImageNet's training images too, and unchanged data sets again.
    """
    report = Report(name, expected=totals(name), source=FACTS[name].source)
    try:
        splits = splits_of(name, root)
    except UsageError as error:
        report.verdict = "missing" if isinstance(error, MissingFileError) else "wrong"
        report.errors.append(str(error))
        return report
    cache = root / ".verified" / f"{name}.json"
    key = _key(splits, report)
    if not thorough and (cached := _cached(cache, key)) is not None:
        return cached
    findings = {}
    for split, pictures in splits.items():
        labels = labels_of(pictures).tolist()
        report.found[split] = len(labels)
        count(report, split, FACTS[name].splits[split], labels)
        if isinstance(pictures, LazyPictures) and not thorough:
            report.notes.append(f"{split}: counted only; --thorough reads its images too")
        else:
            findings[split] = list(findings_of(pictures, f"{name} {split}", num_workers))
    compare(report, findings, root, FACTS[name].sealed)
    if not report.errors and name in FOLDER_SPLITS:
        try:
            ALL_SETS[name](root)
        except UsageError as error:
            report.errors.append(str(error))
    report.verdict = "wrong" if report.errors else "good"
    if key is not None and os.access(root, os.W_OK):
        write_json(cache, {"key": key, "report": asdict(report)})
    return report


def totals(name: str) -> dict[str, int]:
    """The published number of images, by split."""
    return {split: figure.total for split, figure in FACTS[name].splits.items()}


def count(report: Report, split: str, figure: Figure, labels: list[int]) -> None:
    """Compares the size of a split, and of each of its classes, with the published figures."""
    if len(labels) != figure.total:
        report.errors.append(
            f"{split}: expected {figure.total:,} images (source: {report.source}), got "
            f"{len(labels):,}"
        )
    classes = FACTS[report.name].classes
    sizes = Counter(labels)
    if invalid := sorted(set(sizes) - set(range(classes))):
        report.errors.append(f"{split}: expected labels below {classes}, got {invalid[:5]}")
    wrong = []
    for label in range(classes):
        expected = figure.of_class(label)
        if expected is None and not sizes[label]:
            wrong.append(f"class {label} has no images")
        elif expected is not None and sizes[label] != expected:
            wrong.append(f"expected {expected:,} images of class {label}, got {sizes[label]:,}")
    if wrong:
        more = f"; and {len(wrong) - 5} more classes" if len(wrong) > 5 else ""
        message = f"{split}: {'; '.join(wrong[:5])}{more}"
        if figure.confirmed:
            report.errors.append(message)
        else:
            report.notes.append(f"{message} (an unconfirmed figure)")


def compare(
    report: Report, findings: Mapping[str, list[Finding]], root: Path, sealed: bool
) -> None:
    """Reports unreadable images, images in two splits, and duplicates within a split."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, items in findings.items():
        for name, digest, error in items:
            shown = os.path.relpath(name, root) if Path(name).is_absolute() else f"{split} {name}"
            if error:
                report.unreadable += 1
                report.errors.append(f"{shown} cannot be read ({error}); delete it and run again")
            if digest:
                places[digest][split].append(shown)
    duplicates: Counter[str] = Counter()
    for copies in places.values():
        duplicates.update({split: len(names) - 1 for split, names in copies.items()})
        if len(copies) > 1:
            report.shared += 1
            names = " and ".join(names[0] for names in copies.values())
            message = f"{names} are the same image in two splits"
            if sealed:
                report.notes.append(f"{message}, as published")
            else:
                report.errors.append(f"{message}, so test data would be trained on")
    report.notes += [
        f"{split}: {number} images are duplicates" for split, number in duplicates.items() if number
    ]


def _key(splits: Mapping[str, Pictures], report: Report) -> str | None:
    """A hash of the files, with their modification times, and of the published figures."""
    try:
        prints = [f"{split}|{fingerprint(pictures)}" for split, pictures in splits.items()]
    except OSError:  # a listed file does not exist
        return None
    facts = repr(FACTS[report.name])
    return hashlib.sha256("\n".join([*prints, facts]).encode()).hexdigest()


def _cached(path: Path, key: str | None) -> Report | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return Report(**entry["report"]) if key is not None and entry["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
