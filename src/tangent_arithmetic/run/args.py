"""The flags of every command: `Config`, whose fields are the flags.

`parse_arguments(argv)` returns a `Config`; `--batch-size` and `--batch_size` both set
`Config.batch_size`. Settings that follow from several fields (folders, epochs, the suite) are
resolved later, in `run/run.py`, so that `args.model = "ViT-L-14"` after parsing takes effect. A
field holds its help, default and range; `checked` applies the range, to a flag when it is parsed
and to an attribute when it is used.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import operator
import os
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from tangent_arithmetic.data.suites import EMBEDDED_MODEL
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.runtime.errors import UsageError, printable, shown, unknown
from tangent_arithmetic.runtime.ranges import in_range, number, refused

LARGEST_SEED = 2**32 - 1  # of NumPy's generators
LONGEST_PART = 255  # bytes of a file's name
LONGEST_PATH = 4095

Precision = Literal["fp32", "bf16"]
DataSource = Literal["auto", "folder", "torchvision", "hub"]
Names = list[str]


class _Text(str):
    """The text of a number on the command line."""


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    """A field of `Config` with its help; None as default leaves the value to another setting.

    Metadata: "least", "most" and "below", the range of a number or of the numbers in a list;
    "choices", a table by name; "path"; "distinct" and "whole", of the parts of a list; "metavar";
    "hidden" for a field that is no flag.
    """
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class Config:
    """The settings of a run. Assigning an attribute that does not exist raises `UsageError`."""

    # what
    finetuning_mode: str | None = _flag(
        None, "how weights are fine-tuned and edited; each command has some modes", choices=MODES
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

    def __setattr__(self, name: str, value: object) -> None:
        if name not in type(self).__dataclass_fields__:
            raise unknown("setting", name, type(self).__dataclass_fields__)
        object.__setattr__(self, name, value)


def checked(name: str, value: object) -> Any:
    """Returns a setting's value in its plain form.

    A number becomes an int or a float, a comma list a list, and `~` in a path the home folder.

    Args:
        name: the setting.
        value: what a flag, or an attribute of any object, was set to.

    Raises:
        UsageError: if the setting cannot have this value; the message names the flag.
    """
    try:
        return _value(name, value)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--{name.replace('_', '-')}: {error}") from error


@functools.cache
def _settings() -> dict[str, tuple[Field[Any], Any, bool]]:
    """Each setting's field, its type without None, and whether it may be None."""
    hints = typing.get_type_hints(Config)
    settings = {}
    for item in fields(Config):
        parts = typing.get_args(hints[item.name])
        optional = type(None) in parts
        kind = next(p for p in parts if p is not type(None)) if optional else hints[item.name]
        settings[item.name] = (item, kind, optional)
    return settings


def _choices(item: Field[Any], kind: Any) -> tuple[str, ...]:
    """The names that a setting can have; empty if it is not restricted to some."""
    literal = typing.get_origin(kind) is Literal
    return typing.get_args(kind) if literal else tuple(item.metadata.get("choices", ()))


def _value(name: str, value: Any) -> Any:
    item, kind, optional = _settings()[name]
    if value is None and optional:
        return None
    if choices := _choices(item, kind):
        if value not in choices:
            raise refused(f"one of {', '.join(choices)}", value)
        return value
    if kind in (int, float):
        if isinstance(value, _Text):
            return number(kind, **_bounds(item))(value)
        return in_range(kind, value, value, **_bounds(item))
    if kind == Names:
        return _list(item, value)
    if item.metadata.get("path"):
        return pathname(value)
    if kind is str and (value is None or (optional and not str(value).strip())):
        raise refused("a text", "nothing" if value is not None else value)
    return str(value) if kind is str else value


def _bounds(item: Field[Any]) -> dict[str, float | None]:
    return {name: item.metadata.get(name) for name in ("least", "most", "below")}


def _list(item: Field[Any], value: Any) -> Names:
    """The parts of a comma list, or of a list, each checked."""
    if not isinstance(value, str | list | tuple):
        raise refused("a comma list", repr(value))
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names nothing; leave it out for the default")
    if item.metadata.get("path"):
        names = [pathname(part) for part in names]
    if item.metadata.get("whole"):
        names = [str(number(int, **_bounds(item))(part)) for part in names]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None and item.metadata.get("distinct"):
        raise argparse.ArgumentTypeError(f"names {shown(twice)} twice")
    return names


def pathname(value: object) -> str:
    """Returns a path that the file system allows, with the home folder for `~`.

    Raises:
        argparse.ArgumentTypeError: if it is not one.
    """
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
    """A parser for commands with a few flags of their own; its errors are `parse_arguments`'s."""

    def __init__(self, **options: Any) -> None:
        plain = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**{**plain, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, with dashes for the underscores of flags."""
        return super().parse_known_args(_dashed(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Prints what is wrong with the command line, and ends with code 2."""
        if message.startswith("unrecognized arguments: "):
            _refuse_words(message.split()[2:], self._option_string_actions)
        _refuse(message)


def _refuse(message: object) -> NoReturn:
    """Ends the program with code 2 and a message."""
    print(f"error: {printable(str(message))}", file=sys.stderr)  # noqa: T201 - the command's
    raise SystemExit(2)


def _refuse_words(words: Sequence[str], options: Iterable[str]) -> NoReturn:
    """Ends the program because of unknown arguments; the message names the nearest flag."""
    flag = next((word for word in words if word.startswith("--")), None)
    if flag is None:
        _refuse(f"unrecognized arguments: {' '.join(words)}")
    known = [option for option in options if option.startswith("--")]
    _refuse(unknown("flag", flag.partition("=")[0], known))


def _dashed(argv: Sequence[str] | None) -> list[str]:
    """The arguments, `sys.argv[1:]` if None, with dashes for the underscores of flags."""
    parts = [word.partition("=") for word in (sys.argv[1:] if argv is None else argv)]
    return [(n.replace("_", "-") if n.startswith("--") else n) + e + v for n, e, v in parts]


def _check_values(words: Sequence[str]) -> None:
    """Ends the program if a flag that takes a value has none."""
    kinds = {f"--{name.replace('_', '-')}": kind for name, (_, kind, _) in _settings().items()}
    for word, value in itertools.pairwise([*words, "--"]):
        if kinds.get(word, bool) is not bool and value.startswith("--"):
            _refuse(f"{word}: expected a value, got nothing")


def _metavar(item: Field[Any], kind: Any) -> str:
    choices, usual = _choices(item, kind), {int: "N", float: "N", Names: "A,B"}
    named = item.metadata.get("metavar") or usual.get(kind, item.name.upper())
    return f"{{{','.join(choices)}}}" if choices else named


def _numeral(words: list[str]) -> str:
    return _Text(words[0])


def flags() -> type:
    """The flags as a class for tyro, which reads their text; `checked` makes values of it."""
    import tyro

    members = []
    for item, kind, _ in _settings().values():
        if item.metadata.get("hidden"):
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        told = ",".join(default) if isinstance(default, list) else default
        hint = "" if default is None else f"(default: {told})"
        about = tyro.conf.arg(help=item.metadata["help"], help_behavior_hint=hint)
        made: Any = Annotated[bool, about]
        if kind is not bool:
            parser = tyro.constructors.PrimitiveConstructorSpec[str](
                nargs=1,
                metavar=_metavar(item, kind),
                instance_from_str=_numeral if kind in (int, float) else operator.itemgetter(0),
                is_instance=lambda value: True,
                str_from_instance=lambda value: [value],
            )
            made = Annotated[Any, parser, about]
        members.append((item.name, made, copy.copy(item)))
    return make_dataclass("Flags", members)


def paragraphs(text: str | None) -> str:
    """A command's description for tyro, which keeps the ends of indented lines only."""
    return "\n".join(f" {line}" for line in (text or "").strip().splitlines())


def parse_arguments(argv: Sequence[str] | None = None, description: str | None = None) -> Config:
    """Parses the command line.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` if None.
        description: the command's own text for `--help`.

    Returns:
        The settings; paths have `~` expanded, comma lists are lists.

    Raises:
        SystemExit: with code 2 and a message, for an unknown flag or an invalid value.
    """
    return parse_names((), "", argv, description)[1]


def parse_names(
    known: Sequence[str] | None,
    noun: str,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> tuple[list[str], Config]:
    """Parses a command line with names among its flags, in any order.

    Args:
        known: the names to choose from; None if any name will do.
        noun: what they name, for messages.
        argv: as in `parse_arguments`.
        description: as there.
        prog: the command in the help; the program's name if None.

    Returns:
        The names in the order of the command line, and the settings.

    Raises:
        UsageError: if a name is not known.
    """
    import tyro

    words = _dashed(argv)
    _check_values(words)
    parsed: Any
    parsed, names = tyro.cli(
        flags(),
        prog=prog or Path(sys.argv[0]).name,
        description=paragraphs(description),
        args=words,
        return_unknown_args=True,
    )
    no_names = known is not None and not known
    if names and (no_names or any(name.startswith("-") for name in names)):
        _refuse_words(names, _dashed([f"--{name}" for name in vars(parsed)]))
    try:
        config = Config(**{name: checked(name, value) for name, value in vars(parsed).items()})
    except UsageError as error:
        _refuse(error)
    for name in names:
        if known is not None and name not in known:
            raise unknown(noun, name, known)
    return names, config
