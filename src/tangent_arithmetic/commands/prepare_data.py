"""Downloads the public data sets, arranges them for the loaders, and verifies them.

    tangent-arithmetic prepare-data --suite=clip8 --data-location=~/data
    tangent-arithmetic prepare-data --suite=text
    tangent-arithmetic prepare-data --datasets=MNIST,SVHN
    tangent-arithmetic prepare-data --data-location=~/data --check --report=data.json

Complete data sets are skipped, interrupted downloads resumed. For files that cannot be downloaded,
the message says where to get them; put them into `downloads/` below the data root and run again.
With --check nothing is downloaded or moved. Exits with 0 if every data set is complete and correct,
otherwise with 1. docs/data.md lists the sources.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tangent_arithmetic.data.suites import PUBLIC, get_suite
from tangent_arithmetic.run.args import Parser, checked
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown
from tangent_arithmetic.runtime.private import expanded
from tangent_arithmetic.runtime.ranges import number

if TYPE_CHECKING:
    from tangent_arithmetic.data.prepare.verify import Report

SETS = sorted({name for suite in PUBLIC for name in get_suite(suite).names}, key=str.casefold)
HEADER = ["data set", "train", "val", "test", "in two splits", "unreadable", "verdict"]
SHOWN = 10  # messages per data set; the report has all

logger = logging.getLogger(__name__)


def prepare(name: str, root: Path) -> str | None:
    """Downloads and arranges one data set; returns what the user must do first, if anything."""
    from tangent_arithmetic.data.prepare.arrange import ARRANGERS
    from tangent_arithmetic.data.prepare.fetch import Place
    from tangent_arithmetic.data.prepare.text.facts import arrange
    from tangent_arithmetic.data.prepare.verify import FACTS, is_complete

    if is_complete(name, root):
        logger.info("%s: already complete, skipped", name)
        return None
    facts = FACTS[name]
    licence = f" (licence: {facts.licence}; {facts.page})" if facts.licence else ""
    logger.info("%s: preparing%s", name, licence)
    try:
        ARRANGERS.get(name, arrange)(Place(name, facts, root))
    except (UsageError, OSError) as error:
        return str(error)
    return None


def chosen(suite: str, datasets: str | None) -> list[str]:
    """The data sets to prepare: `--datasets`, or all of the suite.

    Raises:
        UsageError: for an unknown name, or a suite that needs no data.
    """
    if suite == "embedded":
        raise UsageError("--suite=embedded needs no data: there is nothing to prepare")
    entry = get_suite(suite)
    control = [] if entry.control is None else [entry.control]
    names = datasets.split(",") if datasets else [*entry.tasks, *control]
    for name in names:
        if name not in SETS:
            raise unknown("data set", name, SETS)
    return list(dict.fromkeys(names))


def messages(report: Report) -> str:
    """The verdict on one data set, with its errors and notes."""
    lines = [f"  error: {text}" for text in report.errors]
    lines += [f"  note: {text}" for text in report.notes]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  and {len(lines) - SHOWN} more; --report=FILE writes all"]
    return "\n".join([f"{report.name}: {report.verdict}", *lines])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="tangent-arithmetic prepare-data", description=__doc__)
    add = parser.add_argument
    add(
        "--suite",
        default="clip8",
        metavar="NAME",
        help="clip8, clip14, clip20 or text (default: clip8)",
    )
    add("--data-location", default="~/data", metavar="PATH", help="data root (default: ~/data)")
    choices = f"of {', '.join(SETS)} (default: the suite's tasks and control)"
    add("--datasets", metavar="NAME,...", help=f"comma-separated list {choices}")
    add("--check", action="store_true", help="only verify the files on disk")
    thorough = "also read ImageNet's training images, and data sets verified before"
    add("--thorough", action="store_true", help=thorough)
    add("--report", type=expanded, metavar="FILE", help="JSON file to write")
    workers, count = "processes that read images (default: one per core)", number(int, 0, 1024)
    add("--num-workers", type=count, default=os.cpu_count() or 1, metavar="N", help=workers)
    return parser.parse_args(argv)


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = _options(argv)
    from tangent_arithmetic.data.prepare.verify import verify
    from tangent_arithmetic.run.tables import markdown_table
    from tangent_arithmetic.runtime.logs import setup_logging  # after --help: imports torch

    setup_logging()
    root = Path(checked("data_location", options.data_location)).absolute()
    names = chosen(options.suite, options.datasets)
    if options.report:
        check_writable(options.report)
    reports = []
    for name in names:
        to_do = None if options.check else prepare(name, root)
        report = verify(name, root, options.num_workers, options.thorough)
        if to_do and report.verdict != "good":
            report.errors.insert(0, to_do)
        reports.append(report)
        if report.errors or report.notes:
            print(messages(report))
    if options.suite == "text" and not options.check:
        from tangent_arithmetic.encoders.published.minilm import DEFAULT, model_folder

        print(f"model: {model_folder(DEFAULT, root / 'downloads')}")
    print(markdown_table(HEADER, [report.row for report in reports]))
    if options.report:
        facts = {"data_location": str(root), "datasets": [asdict(report) for report in reports]}
        write_json(options.report, facts)
    return 0 if all(report.verdict == "good" for report in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())
