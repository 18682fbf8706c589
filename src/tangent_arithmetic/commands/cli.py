"""The command `tangent-arithmetic`: one subcommand for each thing to do."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from tangent_arithmetic import __version__
from tangent_arithmetic.runtime.errors import UsageError, entry_point, unknown

COMMANDS = {
    "suite": "make a suite of your own folders of pictures",
    "finetune": "fine-tune the encoder on each task, standard or linear",
    "evaluate": "evaluate the pre-trained encoder or each fine-tuned one on its own task",
    "add": "add all task vectors and evaluate the sum on every task",
    "negate": "negate each task vector: forget the task, keep the control set",
    "combine": "solve for the coefficients of task vectors, by task, layer or tensor",
    "certify": "certify which coefficients leave a control set's answers as they are",
    "merge": "merge models with composable configuration",
    "analyze": "make the papers' analyses, the report page and the tangent explorer",
    "reproduce": "run the whole benchmark, for one or several seeds",
    "prepare-data": "fetch, arrange and verify the public data sets",
    "checkpoint": "inspect checkpoints, convert published ones",
    "benchmark": "measure training steps, sweeps, start-up and data loading on this machine",
    "artificial-data": "run the study on artificial data",
    "language": "run the papers' experiments with language models",
}
HOMES = {"artificial-data": "tangent_arithmetic.artificial_data.experiment"}
# their flags are `Config`'s
CONFIGURED = ("finetune", "evaluate", "add", "negate", "combine", "certify", "analyze")
COMPLETION = "--completion"
WRITE = "--tyro-write-completion"
SHELLS = ("bash", "zsh", "fish")
ABOUT = f"""
Task arithmetic in weight space and in the tangent space.

tangent-arithmetic COMMAND --help lists the flags of a command.
tangent-arithmetic --version prints the version.
tangent-arithmetic {COMPLETION} SHELL prints a completion script for {", ".join(SHELLS)}.

Examples:
  tangent-arithmetic reproduce --quick
  tangent-arithmetic suite init pictures/pets pictures/flowers --output=mine.yaml
  eval "$(tangent-arithmetic {COMPLETION} bash)"
"""


def describe(*words: str) -> None:
    """Prints help (`--help`) or a completion script of all commands; ends the program."""
    import tyro

    from tangent_arithmetic.run.args import flags, paragraphs
    from tangent_arithmetic.run.usage import USAGES, choices

    plain = make_dataclass("Plain", [])
    completing = words[0] != "--help"
    kinds = {
        name: flags(USAGES[name].fields, choices(name)) if completing else plain
        for name in CONFIGURED
    }
    commands: Any = tuple(
        Annotated[
            Any, tyro.conf.subcommand(name, description=text, constructor=kinds.get(name, plain))
        ]
        for name, text in COMMANDS.items()
    )
    union = Union[commands]  # noqa: UP007 - of a tuple
    about = paragraphs(ABOUT)
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    tyro.cli(union, prog="tangent-arithmetic", description=about, args=words, config=options)


def complete(words: Sequence[str]) -> None:
    """Prints the completion script of a shell, or writes it to a file; ends the program.

    Args:
        words: SHELL, and the FILE to write.

    Raises:
        UsageError: for other words.
    """
    if not words or words[0] not in SHELLS or len(words) > 2:
        raise UsageError(
            f"expected {COMPLETION} SHELL, SHELL one of {', '.join(SHELLS)}; such as "
            f'eval "$(tangent-arithmetic {COMPLETION} bash)"'
        )
    if len(words) == 2:
        describe(WRITE, *words)
    describe("--tyro-print-completion", words[0])


def check_flags(name: str, words: Sequence[str]) -> None:
    """Prints help or refuses invalid flags before a command and all that it needs is imported."""
    from tangent_arithmetic.run.checks import parse_command

    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    parse_command(name, words, ast.get_docstring(ast.parse(source)))


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        describe("--help")
    if name == "--version":
        print(f"tangent-arithmetic {__version__}")
        return 0
    if name in (COMPLETION, WRITE):
        if name == WRITE and (len(rest) != 2 or rest[0] not in SHELLS):
            raise UsageError(f"expected {WRITE} SHELL FILE, SHELL one of {', '.join(SHELLS)}")
        complete(rest)
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    if name in CONFIGURED:
        check_flags(name, rest)
    home = HOMES.get(name, f"tangent_arithmetic.commands.{name.replace('-', '_')}")
    return int(importlib.import_module(home).main(rest))


def script(name: str) -> Callable[..., int]:
    """The entry point of a command, for a script of its own.

    Args:
        name: the command, a key of `COMMANDS`.
    """

    def run(argv: Sequence[str] | None = None) -> int:
        return main([name, *(sys.argv[1:] if argv is None else argv)])

    return run


if __name__ == "__main__":
    raise SystemExit(main())
