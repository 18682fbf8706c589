"""Makes the miniature of the suite `text` that the tests use, from the prepared tables.

    tangent-arithmetic prepare-data --suite=text
    python scripts/vendor_text_miniature.py

The first texts of each class and split, of the tasks whose licence allows it and the control set;
the licences are beside the tables.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tangent_arithmetic.data.text_suite import FOLDER
from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point
from tangent_arithmetic.runtime.private import expanded

TARGET = Path(__file__).parents[1] / "tests" / "data" / "text_miniature"
NAMES = ("Editorials", "Movies", "Products", "Tweets", "Nouns")
COUNTS = {"train": 24, "test": 8}  # texts of a class, a fifth of it for the control set's ten


def shortened(table: Path, target: Path) -> None:
    """Writes the first rows of each class and split of a table."""
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    share = 1 if len({label for _, label, _ in rows}) == 2 else 5
    seen: Counter[tuple[str, str]] = Counter()
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for text, label, split in rows:
            seen[label, split] += 1
            if seen[label, split] <= max(1, COUNTS[split] // share):
                writer.writerow((text, label, split))


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-location", default="~/data", help="data root (default: ~/data)")
    root = expanded(parser.parse_args(argv).data_location)
    (TARGET / FOLDER).mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shortened(root / FOLDER / f"{name}.csv", TARGET / FOLDER / f"{name}.csv")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
