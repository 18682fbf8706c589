"""Flags that the study's commands share."""

from __future__ import annotations

import argparse
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from tangent_arithmetic.artificial_data.presets import PRESETS, SEED_STEP, DatasetSpec, Recipe
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.run.args import LARGEST_SEED, Parser, pathname
from tangent_arithmetic.runtime.ranges import number


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --preset, --root and --device; a module's docstring is its help."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", default="default", choices=sorted(PRESETS),
                        help="data sets and recipes (default: default)")  # fmt: skip
    parser.add_argument("--root", type=lambda text: Path(pathname(text)), default=Path(),
                        help="where artificial_datasets and artificial_checkpoints are made "
                        "(default: the current folder)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cpu, the models being "
                        "small)", default="cpu")  # fmt: skip
    return parser


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Adds --seed."""
    text = "of data, initialisation and order of batches (default: 0)"
    parser.add_argument(
        "--seed", type=number(int, 0, LARGEST_SEED // SEED_STEP - 1), default=0, help=text
    )


def add_fields(
    parser: argparse.ArgumentParser, kind: type[DatasetSpec] | type[Recipe], whose: str
) -> None:
    """Adds a flag for each number of a data set or a recipe."""
    hints = typing.get_type_hints(kind)
    group = parser.add_argument_group(whose, "what is not given is the preset's")
    for item in fields(kind):
        dashed = "--" + item.name.replace("_", "-")
        names = [dashed] if "_" not in item.name else [dashed, f"--{item.name}"]
        if hints[item.name] is bool:
            group.add_argument(*names, dest=item.name, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(
                *names, dest=item.name, type=_number(item.name, hints[item.name]), metavar="N"
            )


def _number(name: str, kind: type) -> Any:
    """The type of such a flag; what numbers go together is checked where they are used."""
    if kind is float:
        return number(float)
    return number(int, 0, LARGEST_SEED if name == "random_state" else 10**8)


def given(args: argparse.Namespace, kind: type[DatasetSpec] | type[Recipe]) -> dict[str, Any]:
    """Those of these flags that were given."""
    values = {item.name: getattr(args, item.name) for item in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def workspace_of(args: argparse.Namespace) -> Workspace:
    """The files that a command works on."""
    return Workspace(args.root, args.preset, args.seed)
