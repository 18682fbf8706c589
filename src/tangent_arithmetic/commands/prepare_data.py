"""Fetches the public data sets, arranges them as the loaders read them, and verifies them.

    python scripts/prepare_data.py --suite=clip8 --data-location=~/data
    python scripts/prepare_data.py --data-location=~/data --datasets=MNIST,SVHN --check

What is complete is passed over; a download or an arrangement that was stopped is continued. Files
that cannot be downloaded are named with where to get them; put them into `downloads/` below the
data root and run again. With --check nothing is fetched or moved. Ends with code 0 if every set is
there and right, otherwise with 1. docs/data.md says where each set comes from.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tangent_arithmetic.data.prepare.arrange import ARRANGERS
from tangent_arithmetic.data.prepare.facts import SETS
from tangent_arithmetic.data.prepare.fetch import Place
from tangent_arithmetic.data.prepare.verify import Report, is_complete, rows, verify
from tangent_arithmetic.data.suites import get_suite
from tangent_arithmetic.run.args import Parser, checked
from tangent_arithmetic.run.results import markdown_table
from tangent_arithmetic.runtime.atomic import check_writable, write_json
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown
from tangent_arithmetic.runtime.logs import setup_logging
from tangent_arithmetic.runtime.ranges import number

HEADER = ["data set", "train", "val", "test", "in two splits", "unreadable", "verdict"]
SHOWN = 10  # messages a data set; the report has all

logger = logging.getLogger(__name__)


def prepare(name: str, root: Path) -> str | None:
    """Fetches and arranges one data set.

    Returns:
        What a person has to do first, if anything.
    """
    if is_complete(name, root):
        logger.info("%s: complete, passed over", name)
        return None
    logger.info("%s: preparing", name)
    try:
        ARRANGERS[name](Place(name, SETS[name], root))
    except (UsageError, OSError) as error:
        return str(error)
    return None


def chosen(suite: str, datasets: str | None) -> list[str]:
    """The data sets to prepare: those named, else all of the suite.

    Raises:
        UsageError: for an unknown name, or a suite that needs no data.
    """
    if suite == "embedded":
        raise UsageError("--suite=embedded needs no data: there is nothing to prepare")
    entry = get_suite(suite)
    names = datasets.split(",") if datasets else [*entry.tasks, entry.control]
    for name in names:
        if name not in SETS:
            raise unknown("data set", name, SETS)
    return list(dict.fromkeys(names))


def messages(report: Report) -> str:
    """What was found of one data set, in lines."""
    lines = [f"  error: {error}" for error in report.errors]
    lines += [f"  note: {note}" for note in report.notes]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  and {len(lines) - SHOWN} more; --report=FILE writes all"]
    return "\n".join([f"{report.name}: {report.verdict}", *lines])


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--suite", default="clip8", help="whose sets to prepare (default: clip8)")
    made.add_argument("--data-location", default="~/data", help="data root (default: ~/data)")
    made.add_argument(
        "--datasets",
        help=f"comma list, of {', '.join(SETS)} (default: the suite's tasks and control)",
    )
    made.add_argument("--check", action="store_true", help="only verify what is there")
    made.add_argument(
        "--thorough",
        action="store_true",
        help="read ImageNet's training pictures too, and what was verified before",
    )
    made.add_argument("--report", type=Path, help="JSON file to write")
    made.add_argument(
        "--num-workers",
        type=number(int, 0, 1024),
        default=os.cpu_count() or 1,
        help="processes that read pictures (default: one a core)",
    )
    return made


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parser().parse_args(argv)
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
    print(markdown_table(HEADER, rows(reports)))
    if options.report:
        facts = {"data_location": str(root), "datasets": [asdict(report) for report in reports]}
        write_json(options.report, facts)
    return 0 if all(report.verdict == "good" for report in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())
