"""Every flag of every script, once.

`parse_arguments(argv)` gives a `Config`. A field is a flag: `--batch-size` and `--batch_size` are
both `Config.batch_size`. Whatever follows from several fields (folders, epochs, the suite) is
computed at use, by the functions in `run/settings.py`, so that `args.model = "ViT-L-14"` after
parsing means what it says. What values a field can have is said here, and checked by `checked`:
for a flag when it is parsed, for an attribute when it is used.
"""

from __future__ import annotations

import argparse
import functools
import os
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tangent_arithmetic.data.suites import EMBEDDED_MODEL
from tangent_arithmetic.runtime.errors import UsageError, printable, shown, unknown
from tangent_arithmetic.runtime.ranges import in_range, number, refused

LARGEST_SEED = 2**32 - 1  # of NumPy's generators
LONGEST_PART = 255  # bytes of a file's name
LONGEST_PATH = 4095

Mode = Literal["none", "standard", "linear", "posthoc"]
Precision = Literal["fp32", "bf16"]
DataSource = Literal["auto", "folder", "torchvision", "hub"]
Names = list[str]


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Config:
    """The settings of a run. Assigning an attribute that does not exist raises `UsageError`."""

    # what
    finetuning_mode: Mode | None = _flag(
        None, "none, standard, linear or posthoc; each script says which it has"
    )
    model: str = _flag(
        EMBEDDED_MODEL,
        "ViT-Nano-8 (embedded), or a CLIP of open_clip such as ViT-B-32, "
        "ViT-B-32__pretrained__TAG_or_FILE, ViT-B-32__init__ (random), hf-hub:ORG/NAME or "
        "local-dir:FOLDER",
    )
    suite: str | None = _flag(None, "embedded or clip8 (default: the model's)")
    tasks: Names | None = _flag(
        None, "tasks to work on, comma list (default: all of the suite)", distinct=True
    )
    train_dataset: Names | None = _flag(
        None, "data sets to fine-tune on, comma list (default: --tasks)", distinct=True
    )
    eval_datasets: Names | None = _flag(
        None, "data sets to evaluate on, comma list (default: --tasks)", distinct=True
    )
    control_dataset: str | None = _flag(
        None,
        "control set that evaluate() adds and negation must preserve (default there: the suite's)",
    )
    # where
    data_location: str = _flag("~/data", "root of the data sets' folders", path=True)
    data_source: DataSource = _flag(
        "auto",
        "where clip8 comes from: the public projects' folders below --data-location, torchvision's "
        "layouts there, the Hugging Face hub, or the first of these that has a set",
    )
    save: str | None = _flag(
        None, "folder of the run's checkpoints (default: checkpoints[_SEED]/MODEL)", path=True
    )
    results: str = _flag("results", "root of the results' folders", path=True)
    load: Names | None = _flag(
        None,
        "checkpoint to use as the pre-trained model instead of its published weights",
        path=True,
        metavar="CHECKPOINT",
    )
    cache_dir: str | None = _flag(
        None, "where caches go (default: ~/.cache/tangent-arithmetic)", path=True
    )
    openclip_cachedir: str = _flag(
        "~/openclip-cachedir/open_clip", "where open_clip keeps downloaded weights", path=True
    )
    results_db: str | None = _flag(None, "file to append one JSON line a result to", path=True)
    # how to train
    batch_size: int | None = _flag(
        None,
        "images of a micro-step, over all processes (default: task table)",
        least=1,
        most=2**20,
    )
    num_grad_accumulation: int | None = _flag(
        None, "micro-steps of an optimizer step (default: task table)", least=1, most=2**16
    )
    lr: float | None = _flag(None, "peak learning rate (default: task table)", least=0, most=1e3)
    wd: float = _flag(0.1, "weight decay of AdamW", least=0, most=1e3)
    ls: float = _flag(0.0, "label smoothing, in [0, 1)", least=0, below=1)
    warmup_length: int | None = _flag(
        None, "optimizer steps of warm-up (default: task table)", least=0, most=10**9
    )
    epochs: int | None = _flag(
        None, "passes over the training set (default: task table)", least=1, most=10**6
    )
    checkpoint_every: int = _flag(
        -1, "optimizer steps between model snapshots (-1: none)", least=-1, most=10**9
    )
    state_every: int | None = _flag(
        None,
        "optimizer steps between states of the run, from which the same command continues it "
        "(default: as often as takes 2 % of the time; -1: none)",
        least=-1,
        most=10**9,
    )
    restart: bool = _flag(
        False, "delete the state of an interrupted run and start anew, instead of continuing it"
    )
    seed: int | None = _flag(
        None,
        "seed of everything random (default: 0); also picks checkpoints_SEED",
        least=0,
        most=LARGEST_SEED,
    )
    # how to evaluate
    n_eval_points: int = _flag(
        21, "coefficients from 0 to 1 to try on validation", least=2, most=10_001
    )
    sample: int | None = _flag(
        None,
        "evaluate on N pictures of each split that hold each class by its share (default: on all); "
        "results go to a folder of their own",
        least=1,
        most=10**9,
    )
    control_threshold: float = _flag(
        0.95, "share of the zero-shot control accuracy that negation must keep", least=0, most=1
    )
    # what to analyse
    pairs: Names | None = _flag(
        None,
        "pairs of tasks whose disentanglement is measured, such as MNIST+Signs,Letters+Emoji",
        distinct=True,
    )
    grid_points: int = _flag(
        11, "coefficients from -2 to 2 on each axis of that", least=2, most=1001
    )
    subset_sample: int = _flag(
        2,
        "standard models: subsets of each size from three tasks to all but one",
        least=0,
        most=10**6,
    )
    analogies: Names | None = _flag(
        None,
        "analogies, such as C+B-A=D by names of data sets (default: the embedded suite's)",
        distinct=True,
    )
    shots: Names = _flag(
        ["1", "5", "20"],
        "training pictures a class where there are few of the target, comma list",
        distinct=True,
        whole=True,
        least=1,
        most=10**6,
    )
    explorer_megabytes: float = _flag(
        15,
        "largest tangent explorer of the report, in MB; a sample is shown if all do not fit",
        least=0.1,
        most=10_000,
    )
    feature_cache: bool = _flag(
        True, "keep the features of linear models, so that they are computed once"
    )
    # on what
    device: str | None = _flag(None, "cpu, cuda, cuda:1, mps (default: the best there is)")
    precision: Precision = _flag(
        "fp32", "fp32, or bf16: autocast, with float32 weights and optimizer"
    )
    world_size: int = _flag(
        1, "processes to start on this machine (torchrun needs no flag)", least=1, most=1024
    )
    port: int = _flag(12355, "port at which the processes meet", least=1, most=65_535)
    num_workers: int | None = _flag(
        None,
        "data-loading processes of each process (default: clip8 one a core, embedded 0)",
        least=0,
        most=1024,
    )
    # what to tell
    exp_name: str | None = _flag(None, "name of the run and of its W&B group")
    wandb: bool = _flag(False, "log to Weights & Biases (WANDB_MODE=offline works)")
    # set by scripts, not flags
    finetuning_accuracies: dict[str, float] = _flag({}, "", hidden=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).__dataclass_fields__:
            raise unknown("setting", name, type(self).__dataclass_fields__)
        object.__setattr__(self, name, value)


def checked(name: str, value: Any) -> Any:
    """The value of a setting, if it can have that value: a flag's, or an attribute's of any object.

    A number becomes a plain one, a text with commas a list where it means one, and `~` in a path
    the home folder.

    Raises:
        UsageError: otherwise; the message names the flag.
    """
    try:
        return _value(name, value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--{name.replace('_', '-')}: {error}") from error


@functools.cache
def _settings() -> dict[str, tuple[Field[Any], Any, bool]]:
    """Each setting's field, its type without None, and whether it may be None."""
    hints = typing.get_type_hints(Config)
    found = {}
    for item in fields(Config):
        parts = typing.get_args(hints[item.name])
        optional = type(None) in parts
        kind = next(p for p in parts if p is not type(None)) if optional else hints[item.name]
        found[item.name] = (item, kind, optional)
    return found


def _value(name: str, value: Any) -> Any:
    item, kind, optional = _settings()[name]
    if value is None and optional:
        return None
    if typing.get_origin(kind) is Literal:
        if value not in (choices := typing.get_args(kind)):
            raise refused(f"one of {', '.join(choices)}", value)
        return value
    if kind in (int, float):
        return in_range(kind, value, value, **_bounds(item))
    if typing.get_origin(kind) is list:
        return _list(item, value)
    if item.metadata.get("path"):
        return pathname(value)
    if kind is str and (value is None or (optional and not str(value).strip())):
        raise refused("a text", "nothing" if value is not None else value)
    return str(value) if kind is str else value


def _bounds(item: Field[Any]) -> dict[str, float | None]:
    return {name: item.metadata.get(name) for name in ("least", "most", "below")}


def _list(item: Field[Any], value: Any) -> Names:
    """The parts of a comma list, or of a list; each of them as a setting of its kind."""
    if not isinstance(value, str | list | tuple):
        raise refused("a comma list", repr(value))
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("names nothing; leave it out for the default")
    if item.metadata.get("path"):
        found = [pathname(part) for part in found]
    if item.metadata.get("whole"):
        try:
            found = [str(number(int, **_bounds(item))(part)) for part in found]
        except ValueError as error:
            raise refused("whole numbers", repr(value)) from error
    if item.metadata.get("distinct") and (twice := _twice(found)):
        raise argparse.ArgumentTypeError(f"names {shown(twice)} twice")
    return found


def _twice(names: Sequence[str]) -> str | None:
    """The first of the names that comes twice."""
    return next((name for i, name in enumerate(names) if name in names[:i]), None)


def pathname(value: Any) -> str:
    """A path that a file can have, with the home folder for `~`; `type=` of argparse."""
    if not isinstance(value, str | os.PathLike):
        raise refused("a path", repr(value))
    text = os.fspath(value)
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    expanded = os.path.expanduser(text)  # noqa: PTH111 - Path's raises where there is no home
    if text.startswith("~") and expanded == text:
        raise argparse.ArgumentTypeError(
            f"the home folder of '{shown(text)}' is not known; a name with ~ is written ./~..."
        )
    try:
        sizes = [len(os.fsencode(part)) for part in Path(expanded).parts]
    except UnicodeEncodeError as error:
        raise refused("a path", repr(text)) from error
    if "\0" in text:
        raise refused("a path", repr(text))
    if max(sizes) > LONGEST_PART or sum(sizes) + len(sizes) > LONGEST_PATH:
        raise refused(
            f"a path of at most {LONGEST_PATH} bytes with names of at most {LONGEST_PART}", text
        )
    return expanded


class Parser(argparse.ArgumentParser):
    """A parser that leaves by `UsageError`-like messages, with the nearest flag for a typo."""

    def error(self, message: str) -> typing.NoReturn:
        """Prints what is wrong with the command line, and ends with code 2."""
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].partition("=")[0]
            options = [
                o for o in self._option_string_actions if o.startswith("--") and "_" not in o
            ]
            message = str(unknown("flag", flag, options))
        self.exit(2, f"error: {printable(message)}\n")


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of all flags, generated from the fields of `Config`."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for item, kind, _ in _settings().values():
        if item.metadata.get("hidden"):
            continue
        dashed = "--" + item.name.replace("_", "-")
        flags = [dashed] if "_" not in item.name else [dashed, "--" + item.name]
        made = item.default_factory
        default = item.default if made is MISSING else made()
        said = ",".join(default) if isinstance(default, list) else default
        text = item.metadata["help"] + (
            "" if default is None or default is False else f" (default: {said})"
        )
        options: dict[str, Any] = {"default": default, "help": text.replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            metavar = item.metadata.get("metavar", "A,B")
            options.update(type=functools.partial(_value, item.name), metavar=metavar)
        elif kind in (int, float):
            options.update(type=number(kind, **_bounds(item)), metavar="N")
        else:
            options.update(type=functools.partial(_value, item.name), metavar=item.name.upper())
        parser.add_argument(*flags, dest=item.name, **options)
    return parser


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> Config:
    """Parses the command line.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` if None.
        description: the script's own sentence for `--help`.

    Returns:
        The settings; paths have `~` expanded, comma lists are lists.

    Raises:
        SystemExit: with code 2 and a message, for a flag or value that does not exist.
    """
    return Config(**vars(make_parser(description).parse_args(argv)))


def parse_names(
    known: Sequence[str],
    noun: str,
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> tuple[list[str], Config]:
    """Parses a command line that has names beside its flags, in any order.

    Args:
        known: the names that there are.
        noun: what a name is of.
        argv: as in `parse_arguments`.
        description: as there.

    Returns:
        The names as given, and the settings.

    Raises:
        UsageError: if a name is not known.
        SystemExit: as in `parse_arguments`.
    """
    parser = make_parser(description)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    found = parser.parse_intermixed_args(argv)
    names = vars(found).pop("names")
    for name in names:
        if name not in known:
            raise unknown(noun, name, known)
    return names, Config(**vars(found))


def require_mode(args: Config, script: str, modes: Sequence[str]) -> str:
    """The fine-tuning mode, if `script` has it.

    Raises:
        UsageError: if it is not given or not one of `modes`.
    """
    mode = args.finetuning_mode
    choices = ", ".join(f"--finetuning-mode={m}" for m in modes)
    if mode is None:
        raise UsageError(f"{script} needs a fine-tuning mode; choose {choices}")
    if mode not in modes:
        raise UsageError(f"{script} has no fine-tuning mode {mode!r}; choose {choices}")
    return mode
