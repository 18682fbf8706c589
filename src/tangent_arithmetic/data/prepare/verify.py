"""What lies on disk against what is published: counts, shared pictures, unreadable files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from tangent_arithmetic.data.base import Pictures
from tangent_arithmetic.data.clip8 import CLIP8_SETS, dtd, eurosat, resisc45, sun397
from tangent_arithmetic.data.clip8.folders import LazyPictures
from tangent_arithmetic.data.identity import fingerprint, labels_of
from tangent_arithmetic.data.prepare.contents import Finding, findings_of
from tangent_arithmetic.data.prepare.facts import SETS, Figure
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

Verdict = Literal["good", "wrong", "missing"]


@dataclass
class Report:
    """What was found of one data set.

    Attributes:
        name: the data set.
        verdict: "good", "wrong" or "missing".
        expected: published number of pictures, by split.
        found: number of pictures, by split.
        shared: pictures that are in more than one split.
        unreadable: pictures that cannot be decoded.
        errors: what is wrong, each with the files it is about.
        notes: what one should know.
        source: where the published figures are from.
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


def splits_of(name: str, root: Path) -> dict[str, Pictures]:
    """The pictures of every split on disk, even if splits share some.

    Raises:
        MissingFileError: if a file or folder is missing.
        UsageError: if classes or files are not what the loader expects.
    """
    if name in FOLDER_SPLITS:
        folders, paths = FOLDER_SPLITS[name]
        folders.check_same(root / path for path in paths.values())
        return {split: folders.pictures(root / path) for split, path in paths.items()}
    splits = CLIP8_SETS[name](root)
    found = {"train": splits.train, "test": splits.test}
    if name == "RESISC45":
        found["val"] = resisc45.read_list(root / "resisc45", "resisc45-val.txt")
    return found


def is_complete(name: str, root: Path) -> bool:
    """Whether every split is there with the published number of pictures."""
    try:
        found = {split: len(pictures) for split, pictures in splits_of(name, root).items()}
    except UsageError:
        return False
    return found == {split: figure.total for split, figure in SETS[name].splits.items()}


def verify(name: str, root: Path, num_workers: int = 1, thorough: bool = False) -> Report:
    """Verifies one data set; what was verified and has not changed since is not read again.

    Args:
        name: the data set.
        root: the data root.
        num_workers: processes that read pictures.
        thorough: whether to read ImageNet's training pictures too, and all sets anew.
    """
    report = Report(name, expected=totals(name), source=SETS[name].source)
    try:
        splits = splits_of(name, root)
    except MissingFileError as error:
        return _closed(report, "missing", str(error))
    except UsageError as error:
        return _closed(report, "wrong", str(error))
    cache = root / ".verified" / f"{name}.json"
    key = _key(splits, report)
    if not thorough and (kept := _kept(cache, key)) is not None:
        return kept
    findings = {}
    for split, pictures in splits.items():
        labels = labels_of(pictures).tolist()
        report.found[split] = len(labels)
        count(report, split, SETS[name].splits[split], labels)
        if isinstance(pictures, LazyPictures) and not thorough:
            report.notes.append(f"{split}: counted only; --thorough reads its pictures too")
        else:
            findings[split] = list(findings_of(pictures, f"{name} {split}", num_workers))
    compare(report, findings, root, SETS[name].sealed)
    if not report.errors and name in FOLDER_SPLITS:
        try:
            CLIP8_SETS[name](root)
        except UsageError as error:
            report.errors.append(str(error))
    report.verdict = "wrong" if report.errors else "good"
    _keep(cache, key, report)
    return report


def totals(name: str) -> dict[str, int]:
    """The published number of pictures, by split."""
    return {split: figure.total for split, figure in SETS[name].splits.items()}


def count(report: Report, split: str, figure: Figure, labels: list[int]) -> None:
    """Compares the pictures of a split, and of each of its classes, with the published figures."""
    if len(labels) != figure.total:
        report.errors.append(
            f"{split}: expected {figure.total:,} pictures (source: {report.source}), got "
            f"{len(labels):,}"
        )
    classes = SETS[report.name].classes
    found = Counter(labels)
    if strange := sorted(set(found) - set(range(classes))):
        report.errors.append(f"{split}: expected labels below {classes}, got {strange[:5]}")
    wrong = []
    for label in range(classes):
        expected = figure.of_class(label)
        if expected is None and not found[label]:
            wrong.append(f"class {label} has no picture")
        elif expected is not None and found[label] != expected:
            wrong.append(f"expected {expected:,} pictures of class {label}, got {found[label]:,}")
    if wrong:
        message = f"{split}: {'; '.join(wrong[:5])}"
        message += f"; and {len(wrong) - 5} classes more" if len(wrong) > 5 else ""
        if figure.confirmed:
            report.errors.append(message)
        else:
            report.notes.append(f"{message} (a figure that is not confirmed)")


def compare(
    report: Report, findings: Mapping[str, list[Finding]], root: Path, sealed: bool
) -> None:
    """Finds unreadable pictures, those in two splits and those that are twice in one."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, items in findings.items():
        for name, digest, error in items:
            shown = os.path.relpath(name, root) if Path(name).is_absolute() else f"{split} {name}"
            if error:
                report.unreadable += 1
                report.errors.append(f"{shown} cannot be read ({error}); delete it and run again")
            if digest:
                places[digest][split].append(shown)
    repeated: Counter[str] = Counter()
    for found in places.values():
        repeated.update({split: len(names) - 1 for split, names in found.items()})
        if len(found) > 1:
            report.shared += 1
            same = " and ".join(names[0] for names in found.values())
            if sealed:
                report.notes.append(f"{same} are one picture in two splits, as published")
            else:
                report.errors.append(
                    f"{same} are one picture in two splits: what is tested was trained on"
                )
    report.notes += [
        f"{split}: {number} pictures are copies of others in it"
        for split, number in repeated.items()
        if number
    ]


def _closed(report: Report, verdict: Verdict, error: str) -> Report:
    report.verdict = verdict
    report.errors.append(error)
    return report


def _key(splits: Mapping[str, Pictures], report: Report) -> str | None:
    """A hash of what is verified: the files with their times, and the published figures."""
    try:
        prints = [f"{split}|{fingerprint(pictures)}" for split, pictures in splits.items()]
    except OSError:  # a listed file that is not there
        return None
    facts = repr(SETS[report.name])
    return hashlib.sha256("\n".join([*prints, facts]).encode()).hexdigest()


def _kept(path: Path, key: str | None) -> Report | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Report(**kept["report"]) if key is not None and kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, key: str | None, report: Report) -> None:
    if key is not None and os.access(path.parent.parent, os.W_OK):
        write_json(path, {"key": key, "report": asdict(report)})


def rows(reports: Iterable[Report]) -> list[list[str]]:
    """The table of what was found: a row a data set."""
    table = []
    for report in reports:
        counts = [_count(report, split) for split in ("train", "val", "test")]
        table.append(
            [report.name, *counts, str(report.shared), str(report.unreadable), report.verdict]
        )
    return table


def _count(report: Report, split: str) -> str:
    expected, found = report.expected.get(split), report.found.get(split)
    if expected is None:
        return "-"
    shown = "?" if found is None else f"{found:,}"
    return shown if found == expected else f"{shown} of {expected:,}"
