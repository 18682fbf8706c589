"""Writes a suite of your own data sets.

    tangent-arithmetic suite init pictures/pets pictures/birds --output=mine.yaml
    tangent-arithmetic suite init pets=photos birds=birds.csv --control=objects=pictures/objects
    tangent-arithmetic suite init pets birds --model=ViT-B-32

Epochs follow the papers' rule: about 2,000 steps of 128 images (60 of 64 for the embedded model),
at most 76 epochs, and a tenth of the steps is warm-up. The file then is a value of --suite.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tangent_arithmetic.data.suites import EMBEDDED_MODEL, check_name, get_suite, suite_of_model
from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import UsageError, entry_point
from tangent_arithmetic.runtime.private import expanded


def init(
    sources: Sequence[str],
    output: Path,
    control: str | None = None,
    model: str = EMBEDDED_MODEL,
    location: Path | None = None,
    force: bool = False,
) -> str:
    """Writes a suite file.

    Args:
        sources: the tasks, each a source or NAME=SOURCE, see `tangent_arithmetic.data.own`.
        output: the file.
        control: the control set likewise; None for none.
        model: the model that it is for; its suite's recipe is used.
        location: the data root, for sources of torchvision.
        force: whether to replace an existing file.

    Returns:
        What was chosen, for the user.

    Raises:
        UsageError: if the file exists, or a data set cannot be read.
    """
    from tangent_arithmetic.data.drafting import check_distinct, draft, named_source, written
    from tangent_arithmetic.data.own.budget import MOST_EPOCHS
    from tangent_arithmetic.runtime.atomic import write_text

    if output.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"--output={output}: expected a name that ends in .yaml or .yml")
    if output.exists() and not force:
        raise UsageError(
            f"{output} exists and is not overwritten; name another file with --output, or add "
            "--force"
        )
    check_name(f"suite name in {output}", output.stem)
    like = get_suite(suite_of_model(model))
    texts = [named_source(text) for text in sources]
    controls = [] if control is None else [named_source(control)]
    check_distinct([*texts, *controls])
    root = location or expanded("~/data")
    drafts = [draft(text, like, output, root) for text in [*texts, *controls]]
    tasks, last = drafts[: len(texts)], drafts[-1] if controls else None
    write_text(output, written(output.stem, tasks, last, like, model))
    lines = [
        f"for {model}: about {like.steps:,} steps of {like.batch_size['']} images a task, at most "
        f"{MOST_EPOCHS} epochs, so that small sets are not learned by heart"
    ]
    lines += [f"{each.name}: {each}" for each in tasks]
    if last is not None:
        lines.append(f"{last.name} (control): {last}")
    else:
        lines.append("no control set: negation needs one (--control), all else does not")
    flags = [f"--suite={output}", *([] if model == EMBEDDED_MODEL else [f"--model={model}"])]
    lines.append(f"wrote {output}; next:")
    lines.append(f"  tangent-arithmetic finetune --finetuning-mode=linear {shlex.join(flags)}")
    return "\n".join(lines)


def parser() -> Parser:
    """The command's flags."""
    root = Parser(prog="tangent-arithmetic suite", description=__doc__)
    commands = root.add_subparsers(dest="command", required=True, metavar="init")
    made = commands.add_parser(
        "init", prog="tangent-arithmetic suite init", description=__doc__, help="write a suite file"
    )
    made.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a task: folder, table, or NAME=SOURCE"
    )
    made.add_argument("--output", default="suite.yaml", metavar="FILE", help="the file to write")
    made.add_argument("--control", metavar="SOURCE", help="the control set that negation preserves")
    made.add_argument("--model", default=EMBEDDED_MODEL, help="the model that the recipe is for")
    made.add_argument(
        "--data-location", default="~/data", metavar="FOLDER", help="root of torchvision's data"
    )
    made.add_argument("--force", action="store_true", help="replace an existing file")
    return root


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    from tangent_arithmetic.runtime.logs import setup_logging

    args = parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    setup_logging()
    output, location = expanded(args.output), expanded(args.data_location)
    print(init(args.sources, output, args.control, args.model, location, args.force))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
