"""Tables the results of merges beside published ones of the same method, model and tasks.

    tangent-arithmetic merge compare outputs/merge/*/program_report.json

A FILE is a report of `merge` (report_save_path=FILE), or a file merging-*.json of a run's results.
The deviation is in percentage points; the table names what differs: whose checkpoints they are, and
the rule of the coefficient. Heads are zero-shot throughout, and splits those of each source, see
docs/published-numbers.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tangent_arithmetic.merging.comparing import comparison, measured, published
from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import entry_point


def _parser() -> argparse.ArgumentParser:
    sets = sorted({row.checkpoints for row in published()})
    parser = Parser(prog="tangent-arithmetic merge compare", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="results of merges")
    parser.add_argument("--model", help="such as ViT-B-32, if the files do not tell")
    parser.add_argument(
        "--checkpoints", help=f"whose checkpoints they are: {', '.join(sets)}, or another name"
    )
    return parser


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    print(comparison([measured(file, args.model, args.checkpoints) for file in args.files]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
