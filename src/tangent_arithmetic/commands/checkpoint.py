"""Inspects checkpoints and converts published ones.

    tangent-arithmetic checkpoint inspect FILE...
    tangent-arithmetic checkpoint convert IN OUT [--model=NAME] [--theta0=FILE] [--force]
    tangent-arithmetic checkpoint convert --to=public IN OUT.pt [--theta0=FILE] [--force]

FILE and IN may be `hf-hub:ORG/NAME`. Nothing in a file is executed. With --to=public a checkpoint
is written as the public projects read it: an encoder as a state dict, a linear one by index, a head
as their class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tangent_arithmetic.run.args import Parser
from tangent_arithmetic.runtime.errors import UsageError, entry_point, shown, system_failure

LONGEST_LINE = 2000


def describe(path: Path) -> str:
    """A summary of a checkpoint in a few lines; long metadata is truncated."""
    from tangent_arithmetic.encoders.loading import load_checkpoint, read_facts, resolve

    resolved = resolve(path)
    facts = read_facts(resolved)
    state = load_checkpoint(resolved)
    sizes = [value.numel() for value in state.theta.values()]
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.theta.values()})
    info: dict[str, Any] = dict(facts["info"])
    lines = [
        str(resolved),
        f"  {facts['kind']}, {info.pop('published', 'written by this project')}",
        f"  model {info.pop('model', 'unknown')}",
        f"  {len(sizes)} tensors, {sum(sizes):,} numbers, {', '.join(dtypes)}",
        f"  hash {facts['hash']}",
        f"  started from {facts['theta0_hash'] or 'unknown'}",
    ]
    lines += [f"  {shown(key)}: {value}" for key, value in sorted(info.items())]
    return "\n".join(shown(line, LONGEST_LINE) for line in lines)


def convert(source: Path, target: Path, model: str | None, theta0: Path | None, force: bool) -> str:
    """Converts a published checkpoint to our format.

    Args:
        source: the published file or folder, or `hf-hub:ORG/NAME`.
        target: the file to write; `.pt` becomes `.safetensors`.
        model: the model's name, if the file does not give it.
        theta0: the pre-trained weights it was fine-tuned from.
        force: whether to overwrite a file with other content.

    Returns:
        A one-line summary.

    Raises:
        UsageError: if the source cannot be read, or the target exists with other content.
    """
    from tangent_arithmetic.encoders.loading import read_facts, resolve
    from tangent_arithmetic.encoders.published import hub
    from tangent_arithmetic.encoders.published.loading import load
    from tangent_arithmetic.storage.checkpoints import as_safetensors, save_tensors

    if hub.is_hub(source):
        source = hub.fetch(source)
    elif not source.exists():
        raise UsageError(f"{source} does not exist, expected a published checkpoint")
    state, target = load(source, model, theta0 and resolve(theta0)), as_safetensors(target)
    if target.exists() and not force:
        if read_facts(target)["hash"] == state.hash:
            return f"{target} already holds the same weights"
        raise UsageError(f"{target} exists with other content; choose another or add --force")
    save_tensors(target, state.theta, state.kind, state.theta0, state.theta0_hash, state.info)
    model = state.info.get("model", "unknown")
    return shown(f"wrote {target} ({state.info['published']}, model {model})", LONGEST_LINE)


def convert_to_public(
    source: Path, target: Path, model: str | None, theta0: Path | None, force: bool
) -> str:
    """Writes a checkpoint as the public projects read it, see `published.writing`.

    Args:
        source: a checkpoint of any origin.
        target: the file to write, `*.pt`.
        model: the model's name, if the file does not give it.
        theta0: a file with the weights beside the vision tower; None for the model's own.
        force: whether to overwrite a file.

    Returns:
        A one-line summary.

    Raises:
        UsageError: if the source cannot be read or has no public format, or the target exists.
    """
    from tangent_arithmetic.encoders.loading import load_checkpoint
    from tangent_arithmetic.encoders.published.writing import write

    if target.exists() and not force:
        raise UsageError(f"{target} exists; choose another or add --force")
    checkpoint = load_checkpoint(source, model=model)
    if model is not None:
        checkpoint = replace(checkpoint, info={**checkpoint.info, "model": model})
    label = write(checkpoint, target, theta0)
    return shown(f"wrote {target} ({label})", LONGEST_LINE)


def inspect(paths: Sequence[Path]) -> int:
    """Describes each file; errors are reported and the rest described all the same.

    Returns:
        The exit code: 2 if a file could not be read.
    """
    failed = False
    for path in paths:
        try:
            print(describe(path), flush=True)
        except (UsageError, OSError) as error:
            failed = True
            reason = error if isinstance(error, UsageError) else system_failure(error)
            print(f"error: {reason}", file=sys.stderr, flush=True)
    return 2 if failed else 0


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(prog="tangent-arithmetic checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="describe checkpoints")
    inspecting.add_argument("files", nargs="+", type=Path)
    converting = commands.add_parser("convert", help="convert a file to our format, or back")
    converting.add_argument(
        "--to",
        choices=["ours", "public"],
        default="ours",
        help="the format to write: ours (default), or that of the public projects",
    )
    converting.add_argument("source", type=Path, metavar="IN")
    converting.add_argument("target", type=Path, metavar="OUT")
    converting.add_argument("--model", help="the model's name, such as ViT-B-32")
    converting.add_argument("--theta0", type=Path, help="the weights it was fine-tuned from")
    converting.add_argument("--force", action="store_true", help="overwrite OUT")
    args = parser.parse_args(argv)
    if args.command == "inspect":
        return inspect(args.files)
    converted = convert_to_public if args.to == "public" else convert
    print(converted(args.source, args.target, args.model, args.theta0, args.force))
    return 0
