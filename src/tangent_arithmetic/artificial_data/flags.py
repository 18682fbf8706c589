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


def make_parser(description: str | None) -> Parser:
    """A parser with --preset, --root and --device; `description` is shown by --help."""
    parser = Parser(description=description)
    add = parser.add_argument
    text = "data sets and recipes (default: default)"
    add("--preset", default="default", choices=sorted(PRESETS), help=text)
    text = "parent of artificial_datasets and artificial_checkpoints (default: the current folder)"
    add("--root", type=lambda path: Path(pathname(path)), default=Path(), metavar="PATH", help=text)
    text = "cpu, cuda, cuda:1, mps (default: cpu, the models being small)"
    add("--device", default="cpu", help=text)
    return parser


def add_seed(parser: Parser) -> None:
    """Adds --seed."""
    text = "seed of data, initialisation and order of batches (default: 0)"
    largest = LARGEST_SEED // SEED_STEP - 1
    parser.add_argument("--seed", type=number(int, 0, largest), default=0, help=text)


def add_fields(parser: Parser, kind: type[DatasetSpec] | type[Recipe], title: str) -> None:
    """Adds a flag for each field of a data set or a recipe, in a group of the help."""
    group = parser.add_argument_group(title, "the preset's by default")
    for name, hint in typing.get_type_hints(kind).items():
        flag = f"--{name.replace('_', '-')}"
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif hint is float:
            group.add_argument(flag, type=number(float), metavar="N")
        else:  # which numbers go together is checked where they are used
            largest = LARGEST_SEED if name == "random_state" else 10**8
            group.add_argument(flag, type=number(int, 0, largest), metavar="N")


def given(args: argparse.Namespace, kind: type[DatasetSpec] | type[Recipe]) -> dict[str, Any]:
    """The fields whose flags were set explicitly."""
    values = {item.name: getattr(args, item.name) for item in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def workspace_of(args: argparse.Namespace) -> Workspace:
    """The files of the command's preset and seed."""
    return Workspace(args.root, args.preset, args.seed)
