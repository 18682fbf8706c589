"""The command `tangent-arithmetic`: one subcommand for each thing to do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tangent_arithmetic import __version__

COMMANDS = {
    "finetune": "fine-tune the encoder on each task, standard or linear",
    "evaluate": "evaluate the pre-trained encoder or each fine-tuned one on its own task",
    "add": "add all task vectors and evaluate the sum on every task",
    "negate": "negate each task vector: forget the task, keep the control set",
    "merge": "merge models with composable configuration",
    "analyze": "make the papers' analyses, the report page and the tangent explorer",
    "reproduce": "run the whole benchmark, for one or several seeds",
    "prepare-data": "fetch, arrange and verify the public data sets",
    "checkpoint": "inspect checkpoints, convert published ones",
    "benchmark": "measure training steps, sweeps, start-up and data loading on this machine",
    "artificial-data": "run the study on artificial data",
}
HOMES = {"artificial-data": "tangent_arithmetic.artificial_data.experiment"}


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tangent-arithmetic COMMAND [flags]",
            "",
            "Task arithmetic in weight space and in the tangent space.",
            "",
            "commands:",
            *lines,
            "",
            "tangent-arithmetic COMMAND --help lists the flags of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"tangent-arithmetic {__version__}")
        return 0
    if name not in COMMANDS:
        from tangent_arithmetic.runtime.errors import unknown

        print(f"error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    home = HOMES.get(name, f"tangent_arithmetic.commands.{name.replace('-', '_')}")
    code: int = importlib.import_module(home).main(rest)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
