"""The command `tangent-arithmetic`: one subcommand for each thing to do.

`--tyro-write-completion SHELL FILE` writes a completion script for bash, zsh or fish.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from tangent_arithmetic import __version__
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown

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
CONFIGURED = ("finetune", "evaluate", "add", "negate", "analyze")  # their flags are `Config`'s
COMPLETION = "--tyro-write-completion"
SHELLS = ("bash", "zsh", "fish")
ABOUT = f"""
Task arithmetic in weight space and in the tangent space.

tangent-arithmetic COMMAND --help lists the flags of a command.
tangent-arithmetic --version prints the version.
tangent-arithmetic {COMPLETION} SHELL FILE writes a completion script for
{", ".join(SHELLS)}; source FILE in the start-up file of your shell.
"""


def describe(*words: str) -> None:
    """Prints help (`--help`) or writes a completion script of all commands; ends the program."""
    import tyro

    from tangent_arithmetic.run.args import flags, paragraphs

    plain = make_dataclass("Plain", [])
    commands: Any = tuple(
        Annotated[
            Any,
            tyro.conf.subcommand(
                name, description=text, constructor=flags() if name in CONFIGURED else plain
            ),
        ]
        for name, text in COMMANDS.items()
    )
    union = Union[commands]  # noqa: UP007 - of a tuple
    tyro.cli(union, prog="tangent-arithmetic", description=paragraphs(ABOUT), args=words)


def check_flags(name: str, words: Sequence[str]) -> None:
    """Prints help or refuses invalid flags before a command and all that it needs is imported."""
    from tangent_arithmetic.run.args import parse_names

    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    description = ast.get_docstring(ast.parse(source))
    parse_names(None, "", words, description, f"tangent-arithmetic {name}")


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        describe("--help")
    if name == "--version":
        print(f"tangent-arithmetic {__version__}")
        return 0
    if name == COMPLETION:
        if len(rest) != 2 or rest[0] not in SHELLS:
            raise UsageError(f"expected {COMPLETION} SHELL FILE, SHELL one of {', '.join(SHELLS)}")
        describe(name, *rest)
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    if name in CONFIGURED:
        check_flags(name, rest)
    home = HOMES.get(name, f"tangent_arithmetic.commands.{name.replace('-', '_')}")
    return int(importlib.import_module(home).main(rest))


if __name__ == "__main__":
    raise SystemExit(main())
