"""Every flag of every script, once.

`parse_arguments(argv)` gives a `Config`. A field is a flag: `--batch-size` and `--batch_size` are
both `Config.batch_size`. Whatever follows from several fields (folders, epochs, the suite) is
computed at use, by the functions in `src/settings.py`, so that `args.model = "ViT-L-14"` after
parsing means what it says.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from src.errors import UsageError, unknown
from src.tasks import EMBEDDED_MODEL

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
    tasks: Names | None = _flag(None, "tasks to work on, comma list (default: all of the suite)")
    train_dataset: Names | None = _flag(
        None, "data sets to fine-tune on, comma list (default: --tasks)"
    )
    eval_datasets: Names | None = _flag(
        None, "data sets to evaluate on, comma list (default: --tasks)"
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
        None, "images of a micro-step, over all processes (default: task table)", least=1
    )
    num_grad_accumulation: int | None = _flag(
        None, "micro-steps of an optimizer step (default: task table)", least=1
    )
    lr: float | None = _flag(None, "peak learning rate (default: task table)", least=0)
    wd: float = _flag(0.1, "weight decay of AdamW", least=0)
    ls: float = _flag(0.0, "label smoothing, in [0, 1)", least=0)
    warmup_length: int | None = _flag(
        None, "optimizer steps of warm-up (default: task table)", least=0
    )
    epochs: int | None = _flag(None, "passes over the training set (default: task table)", least=1)
    checkpoint_every: int = _flag(-1, "optimizer steps between model snapshots (-1: none)")
    state_every: int | None = _flag(
        None,
        "optimizer steps between states of the run, from which the same command continues it "
        "(default: as often as takes 2 % of the time; -1: none)",
    )
    seed: int | None = _flag(
        None, "seed of everything random (default: 0); also picks checkpoints_SEED"
    )
    # how to evaluate
    n_eval_points: int = _flag(21, "coefficients from 0 to 1 to try on validation", least=2)
    sample: int | None = _flag(
        None,
        "evaluate on N pictures of each split that hold each class by its share (default: on all); "
        "results go to a folder of their own",
        least=1,
    )
    control_threshold: float = _flag(
        0.95, "share of the zero-shot control accuracy that negation must keep", least=0
    )
    # what to analyse
    pairs: Names | None = _flag(
        None, "pairs of tasks whose disentanglement is measured, such as MNIST+Signs,Letters+Emoji"
    )
    grid_points: int = _flag(11, "coefficients from -2 to 2 on each axis of that", least=2)
    subset_sample: int = _flag(
        2, "standard models: subsets of each size from three tasks to all but one", least=0
    )
    analogies: Names | None = _flag(
        None, "analogies, such as C+B-A=D by names of data sets (default: the embedded suite's)"
    )
    shots: Names = _flag(
        ["1", "5", "20"], "training pictures a class where there are few of the target, comma list"
    )
    explorer_megabytes: float = _flag(
        15,
        "largest tangent explorer of the report, in MB; a sample is shown if all do not fit",
        least=0.1,
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
        1, "processes to start on this machine (torchrun needs no flag)", least=1
    )
    port: int = _flag(12355, "port at which the processes meet", least=1)
    num_workers: int | None = _flag(
        None,
        "data-loading processes of each process (default: clip8 one a core, embedded 0)",
        least=0,
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


def _inner(annotation: Any) -> Any:
    """The type inside `X | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(t for t in typing.get_args(annotation) if t is not type(None))
    return annotation


def _number(kind: type, least: float | None) -> Any:
    def parse(text: str) -> float:
        value: float = kind(text)
        if least is not None and not value >= least:  # nan is refused too
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _names(text: str) -> Names:
    return [part.strip() for part in text.split(",") if part.strip()]


class _Parser(argparse.ArgumentParser):
    """A parser that leaves by `UsageError`-like messages, with the nearest flag for a typo."""

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].partition("=")[0]
            options = [
                o for o in self._option_string_actions if o.startswith("--") and "_" not in o
            ]
            message = str(unknown("flag", flag, options))
        self.exit(2, f"error: {message}\n")


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of all flags, generated from the fields of `Config`."""
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(Config)
    for item in fields(Config):
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
        kind = _inner(hints[item.name])
        options: dict[str, Any] = {"default": default, "help": text.replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            options.update(type=_names, metavar=item.metadata.get("metavar", "A,B"))
        elif kind in (int, float):
            options.update(type=_number(kind, item.metadata.get("least")), metavar="N")
        else:
            options["metavar"] = item.name.upper()
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
    return _config(make_parser(description).parse_args(argv))


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
    return names, _config(found)


def _config(found: argparse.Namespace) -> Config:
    """The settings, with `~` expanded."""
    config = Config(**vars(found))
    for item in fields(Config):
        if item.metadata.get("path"):
            value = getattr(config, item.name)
            if isinstance(value, list):
                setattr(config, item.name, [str(Path(v).expanduser()) for v in value])
            elif value is not None:
                setattr(config, item.name, str(Path(value).expanduser()))
    return config


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
