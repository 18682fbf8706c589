"""What can be wrong with a command line, found before PyTorch is imported."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tangent_arithmetic.data.suites import EMBEDDED_MODEL
from tangent_arithmetic.run.analogies import names_of_analogy
from tangent_arithmetic.run.args import Config, flags, parse_names
from tangent_arithmetic.run.modes import SUPERVISED, require_mode
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.usage import USAGES, examples_of
from tangent_arithmetic.runtime.errors import UsageError, closest, shown
from tangent_arithmetic.runtime.private import expanded

HUB = "hf-hub:"
FOLDER = "local-dir:"
SHOWN = 8  # names in a message
ENDINGS = (".safetensors", ".pt")  # of checkpoints


def parse_command(
    command: str, argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[list[str], Config]:
    """Parses and checks the flags of a command.

    Args:
        command: its name, a key of `USAGES`.
        argv: its arguments; `sys.argv[1:]` if None.
        description: its own text for `--help`.

    Returns:
        The names among the flags, and the settings.

    Raises:
        SystemExit: with code 2 and a message, for an unknown flag or an invalid value.
        UsageError: for a mode that the command lacks, an unknown data set, suite or model, or a
            path that does not exist.
    """
    usage = USAGES[command]
    text = f"{(description or '').strip()}\n\n{examples_of(usage.examples)}"
    names, config = parse_names(
        usage.names,
        usage.noun,
        argv,
        text,
        f"tangent-arithmetic {command}",
        flags(usage.fields, {"finetuning_mode": usage.modes()}, usage.texts),
    )
    run = Run.of(config)
    if usage.needs_mode or run.config.finetuning_mode is not None:
        require_mode(run.config.finetuning_mode, f"{usage.script}.py", usage.modes())
    check(run)
    return names, run.config


def check(run: Run) -> None:
    """Checks names and paths of a run that can be checked without PyTorch.

    Raises:
        UsageError: naming what is wrong; unknown names list the choices, nearest first.
    """
    run.check()
    _check_model(run.model)
    _check_load(run)
    if run.config.others and run.config.finetuning_mode and run.mode.objective != SUPERVISED:
        for task in run.train_datasets:
            run.others(task)
    for flag, texts in (("pairs", run.config.pairs), ("analogies", run.config.analogies)):
        for name in (part for text in texts or () for part in _unknown_in(run, flag, text)):
            run.suite.check(name)


def _unknown_in(run: Run, flag: str, text: str) -> list[str]:
    """What is no data set of the suite in a pair, A+B, or an analogy, C+B-A=D or C+B-A=D!W."""
    if flag == "pairs":
        names: Sequence[str] = text.split("+")
    else:
        names = names_of_analogy(run.suite.names, text) or re.split(r"[+\-=!]", text)
    known = set(run.suite.names)
    return [n for name in names if (n := name.strip()) and n.removesuffix("Val") not in known]


def _check_model(model: str) -> None:
    """Checks the name of an open_clip architecture; other models are checked when they are built.

    Raises:
        UsageError: if open_clip has no such architecture, or a folder is missing.
    """
    name = model.removesuffix("__init__").partition("__pretrained__")[0]
    if name.startswith(FOLDER):
        folder = expanded(name.removeprefix(FOLDER))
        if not folder.is_dir():
            raise UsageError(f"--model: expected a folder at {shown(folder)}, found none")
        return
    if ":" in name or name == EMBEDDED_MODEL:
        return
    known = architectures()
    if known and name.replace("/", "-") not in known:
        nearest = ", ".join(closest(name, [EMBEDDED_MODEL, *known])[:SHOWN])
        raise UsageError(
            f"unknown model '{shown(name)}'; nearest of open_clip's: {nearest}. Models of others "
            "are timm:NAME, torchvision:NAME, hf-hub:ORG/NAME, local-dir:FOLDER or "
            "python:MODULE:FACTORY"
        )


def architectures() -> list[str]:
    """The architectures of open_clip, from the names of its files; empty if they are not there."""
    if "open_clip" in sys.modules:  # may have got further ones
        return [str(name) for name in sys.modules["open_clip"].list_models()]
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return []
    return sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json"))


def _check_load(run: Run) -> None:
    """Checks that there are checkpoints where the one of `--load` is looked for.

    Raises:
        UsageError: if there are none.
    """
    if run.load is None or run.load.startswith(HUB) or Path(run.load).exists():
        return
    folder = Path(run.load).absolute().parent
    twin = folder.name.removesuffix("Val") if folder.name.endswith("Val") else f"{folder.name}Val"
    places = [folder, folder.with_name(twin) if folder.name else folder, folder.parent]
    if not any(path.suffix in ENDINGS for place in places for path in place.glob("*.*")):
        raise UsageError(f"--load: expected a checkpoint at {shown(run.load)}, found none")
