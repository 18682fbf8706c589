"""The settings of a run: `Config`, whose fields are the flags of every command.

Settings that follow from several fields (folders, epochs, the suite) are resolved later, in
`run/run.py`, so that `args.model = "ViT-L-14"` after parsing takes effect. A field holds its help,
default, range and group; `checked` applies the range, to a flag when it is parsed and to an
attribute when it is used.
"""

from __future__ import annotations

import argparse
import functools
import os
import typing
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tangent_arithmetic.data.suites import EMBEDDED_MODEL
from tangent_arithmetic.run.modes import ALL, MODES, OBJECTIVES, SUPERVISED
from tangent_arithmetic.runtime.errors import UsageError, shown, unknown
from tangent_arithmetic.runtime.ranges import in_range, number, refused

LARGEST_SEED = 2**32 - 1  # of NumPy's generators
LONGEST_PART = 255  # bytes of a file's name
LONGEST_PATH = 4095
GROUPS = ("model", "data", "training", "evaluation", "solving", "analysis", "machine")
SETS = "NAME[=SOURCE],..."

Precision = Literal["fp32", "bf16"]
DataSource = Literal["auto", "folder", "torchvision", "hub"]
Style = Literal["screen", "paper"]
Ahead = Literal["none", "sums", "page"]
HeadKind = Literal["auto", "zeroshot", "probe"]
PenaltyNorm = Literal["relative", "squared", "plain"]
OthersPerStep = Literal["one", "all"]
FactorKind = Literal["diag", "kfac", "ekfac"]
TestSplit = Literal["test", "validation"]
Unlabelled = Literal["entropy", "selflabel"]
CoefficientSolver = Literal["auto", "gauss-newton", "quasi-newton"]
RecipeName = Literal["papers", "fast"]
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["cosine", "constant"]
Names = list[str]


class Numeral(str):
    """The text of a number on the command line."""


def _flag(group: str, default: Any, text: str, **metadata: Any) -> Any:
    """A field of `Config` with its help; None as default leaves the value to another setting.

    Metadata: "group", one of `GROUPS`; "least", "most" and "below", the range of a number or of the
    numbers in a list; "choices", a table by name; "path"; "distinct" and "whole", of the parts of a
    list; "metavar"; "hidden" for a field that is no flag.
    """
    about = {"help": text, "group": group, **metadata}
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


@dataclass
class Config:
    """The settings of a run. Assigning an attribute that does not exist raises `UsageError`."""

    finetuning_mode: str | None = _flag(
        "model",
        None,
        "how weights are fine-tuned and edited; MODE+OBJECTIVE+TRAINABLE for variants, such as "
        "linear+taujp or linear+attention",
        choices=MODES,
        composed=True,
    )
    model: str = _flag(
        "model",
        EMBEDDED_MODEL,
        "ViT-Nano-8 (embedded), or a CLIP of open_clip such as ViT-B-32, "
        "ViT-B-32__pretrained__TAG_or_FILE, ViT-B-32__init__ (random), hf-hub:ORG/NAME or "
        "local-dir:FOLDER; timm:NAME, torchvision:NAME, transformers:NAME_OR_FOLDER, "
        "text-tower:CLIP or python:MODULE:FACTORY",
        metavar="NAME",
    )
    load: Names | None = _flag(
        "model",
        None,
        "checkpoint to use as the pre-trained model instead of its published weights",
        path=True,
        metavar="CHECKPOINT",
    )
    head: HeadKind = _flag(
        "model",
        "auto",
        "classification heads: zeroshot, from the text tower; probe, a linear probe on the "
        "pre-trained features; auto: zeroshot where the model has a text tower",
    )
    openclip_cachedir: str = _flag(
        "model",
        "~/openclip-cachedir/open_clip",
        "where open_clip keeps downloaded weights",
        path=True,
    )
    save: str | None = _flag(
        "model",
        None,
        "folder of the run's checkpoints (default: checkpoints[_SEED]/MODEL)",
        path=True,
    )
    seed: int | None = _flag(
        "model",
        None,
        "seed of everything random (default: 0); also picks checkpoints_SEED",
        least=0,
        most=LARGEST_SEED,
    )
    suite: str | None = _flag(
        "data",
        None,
        "embedded, clip8, clip14, clip20, text or a YAML file of your own (default: the model's, "
        "or the data sets named)",
        metavar="NAME|FILE",
    )
    tasks: Names | None = _flag(
        "data",
        None,
        "tasks to work on (default: all of the suite); SOURCE is a folder of pictures, a .csv or "
        ".parquet file, hub:ORG/NAME, torchvision:CLASS or python:MODULE:FACTORY",
        distinct=True,
        metavar=SETS,
    )
    train_dataset: Names | None = _flag(
        "data", None, "data sets to fine-tune on (default: --tasks)", distinct=True, metavar=SETS
    )
    eval_datasets: Names | None = _flag(
        "data", None, "data sets to evaluate on (default: --tasks)", distinct=True, metavar=SETS
    )
    control_dataset: str | None = _flag(
        "data",
        None,
        "control set that evaluate() adds and negation must preserve (default there: the suite's)",
        metavar="NAME[=SOURCE]",
    )
    template: str | None = _flag(
        "data",
        None,
        "prompt of your own data sets, such as 'a photo of a {}.', or a file of prompts",
        metavar="TEXT|FILE",
    )
    data_location: str = _flag("data", "~/data", "root of the data sets' folders", path=True)
    data_source: DataSource = _flag(
        "data",
        "auto",
        "where public data sets come from: the public projects' folders below --data-location, "
        "torchvision's layouts there, the Hugging Face hub, or the first of these that has a set",
    )
    recipe: RecipeName = _flag(
        "training",
        "papers",
        "papers: the suite's table; fast: half the examples, smaller batches, at a constant rate, "
        "and the mean of the last half of the iterates",
    )
    batch_size: int | None = _flag(
        "training",
        None,
        "examples of a micro-step, over all processes (default: task table)",
        least=1,
        most=2**20,
    )
    num_grad_accumulation: int | None = _flag(
        "training",
        None,
        "micro-steps of an optimizer step (default: task table)",
        least=1,
        most=2**16,
    )
    lr: float | None = _flag(
        "training", None, "peak learning rate (default: task table)", least=0, most=1e3
    )
    wd: float = _flag("training", 0.1, "weight decay of AdamW", least=0, most=1e3)
    ls: float = _flag("training", 0.0, "label smoothing, in [0, 1)", least=0, below=1)
    warmup_length: int | None = _flag(
        "training", None, "optimizer steps of warm-up (default: task table)", least=0, most=10**9
    )
    epochs: int | None = _flag(
        "training", None, "passes over the training set (default: task table)", least=1, most=10**6
    )
    image_share: float | None = _flag(
        "training",
        None,
        "share of the examples of these epochs to train on (default: the recipe's)",
        least=0,
        most=1,
    )
    optimizer: OptimizerName | None = _flag(
        "training", None, "optimizer (default: the recipe's, adamw)"
    )
    schedule: ScheduleName | None = _flag(
        "training",
        None,
        "learning rate after warm-up: half a cosine to 0, or constant (default: the recipe's)",
    )
    averaging: float | None = _flag(
        "training",
        None,
        "share of the steps, at the end, whose iterates are averaged; 0 for none (default: the "
        "recipe's)",
        least=0,
        most=1,
    )
    target: float | None = _flag(
        "training",
        None,
        "validation accuracy at which fine-tuning ends, in [0, 1] (default: none)",
        least=0,
        most=1,
    )
    patience: int | None = _flag(
        "training",
        None,
        "of 16 measurements of validation accuracy a run (with averaging only those since it has "
        "begun), those in a row without a gain after which fine-tuning ends (default: it does not)",
        least=1,
        most=16,
    )
    objective: str = _flag(
        "training",
        SUPERVISED,
        "what is minimised: supervised, the cross-entropy (of each class for several labels an "
        "example); taujp, tak, orthoreg, with a penalty on interference; delta, distillation from "
        "the linear model; ascent, the loss with its sign turned, a baseline of negation",
        choices=OBJECTIVES,
    )
    trainable: str = _flag(
        "training",
        ALL,
        "parameters to train: all, attention, attention-weights, mlp, norm, norm_and_bias, last:K "
        "(blocks), lora:R (rank; lora:R:WHICH for other matrices), talos:SHARE (of the weights, "
        "the least sensitive), or a regular expression of their names",
        metavar="WHICH",
    )
    penalty: float | None = _flag(
        "training",
        None,
        "weight of the objective's penalty (default: the objective's)",
        least=0,
        most=1e9,
    )
    penalty_norm: PenaltyNorm = _flag(
        "training",
        "relative",
        "τJp: the mean of |J tau|^2 / |f0|^2 (relative), of |J tau|^2 (squared), or of |J tau| "
        "(plain); delta: of the student's difference to its teacher instead of J tau",
    )
    others: Names | None = _flag(
        "training",
        None,
        "data sets whose examples, without labels, the penalty keeps unchanged (default: the run's "
        "other tasks and its control set)",
        distinct=True,
        metavar=SETS,
    )
    others_batch_size: int | None = _flag(
        "training",
        None,
        "of these examples, those of a step, over all processes (default: half as many as labelled "
        "examples)",
        least=1,
        most=2**20,
    )
    others_per_step: OthersPerStep = _flag(
        "training", "one", "data sets among these whose examples a step takes: one in turn, or all"
    )
    factors: FactorKind = _flag(
        "training",
        "ekfac",
        "tak: form of the Gauss-Newton matrix: its diagonal, Kronecker factors (kfac), or these "
        "with the second moments of examples' gradients (ekfac)",
    )
    factor_images: int = _flag(
        "training",
        256,
        "tak: examples of each data set that factors are collected from",
        least=1,
        most=10**6,
    )
    factor_rank: int = _flag(
        "training", 128, "tak: rank of a data set's factors of a layer", least=1, most=10_000
    )
    factor_directions: int = _flag(
        "training",
        64,
        "tak: leading directions through all layers (0: layers are independent)",
        least=0,
        most=10_000,
    )
    teacher: str | None = _flag(
        "training",
        None,
        "delta: the mode whose checkpoint of the task is distilled (default: linear+taujp if it is "
        "there, else linear)",
        choices=MODES,
        composed=True,
        metavar="MODE",
    )
    coef_min: float = _flag(
        "training", 0.5, "delta: smallest coefficient that the student follows at", least=0, most=10
    )
    coef_max: float = _flag(
        "training", 1.0, "delta: largest coefficient that the student follows at", least=0, most=10
    )
    coefs_per_step: int = _flag(
        "training", 1, "delta: coefficients a step, each one standard pass", least=1, most=1000
    )
    checkpoint_every: int = _flag(
        "training", -1, "optimizer steps between model snapshots (-1: none)", least=-1, most=10**9
    )
    state_every: int | None = _flag(
        "training",
        None,
        "optimizer steps between states of the run, from which the same command continues it "
        "(default: as often as takes 2 % of the time; -1: none)",
        least=-1,
        most=10**9,
    )
    restart: bool = _flag(
        "training",
        False,
        "delete the state of an interrupted run and start anew, instead of continuing it",
    )
    n_eval_points: int = _flag(
        "evaluation", 21, "coefficients from 0 to 1 to try on validation", least=2, most=10_001
    )
    sample: int | None = _flag(
        "evaluation",
        None,
        "evaluate on N examples of each split that hold each class by its share (default: on all); "
        "results go to a folder of their own",
        least=1,
        most=10**9,
    )
    control_threshold: float = _flag(
        "evaluation",
        0.95,
        "share of the zero-shot control accuracy that negation must keep",
        least=0,
        most=1,
    )
    ahead: Ahead = _flag(
        "evaluation",
        "none",
        "in linear modes, compute in the same passes what later commands read from the cache: sums "
        "and negations (sums), or the page's explorer too (page)",
    )
    feature_cache: bool = _flag(
        "evaluation", True, "keep features of linear and of unedited models, to compute them once"
    )
    results: str = _flag("evaluation", "results", "root of the results' folders", path=True)
    results_db: str | None = _flag(
        "evaluation", None, "file to append one JSON line a result to", path=True, metavar="FILE"
    )
    coefficients: str = _flag(
        "solving",
        "task-layer",
        "a coefficient for each task, layer (shared by the tasks), task-layer (layer of each "
        "task), block (tensor of each task), or match of a regular expression in the names of each "
        "task's parameters",
        metavar="WHICH",
    )
    unlabelled: Unlabelled | None = _flag(
        "solving",
        None,
        "solve on validation examples without their labels: by the entropy of the predictions, or "
        "by self-labels (default: with labels)",
    )
    negate: bool = _flag("solving", False, "forget each task instead, and keep the control set")
    ridge: float | None = _flag(
        "solving",
        None,
        "strength of the pull towards the best coefficient for all (default: cross-validated; 0.1 "
        "for the quasi-Newton method)",
        least=0,
        most=1e9,
    )
    coefficient_bounds: Names | None = _flag(
        "solving",
        None,
        "least and largest coefficient, such as 0,1 (default: none)",
        metavar="LOW,HIGH",
    )
    solver: CoefficientSolver = _flag(
        "solving",
        "auto",
        "standard models: passes of Gauss-Newton, a quasi-Newton method on the true loss, or auto: "
        "the one that needs fewer forward passes",
    )
    modes: Names | None = _flag(
        "analysis",
        None,
        "modes to analyse (default: those with checkpoints)",
        distinct=True,
        metavar="MODE,...",
    )
    pairs: Names | None = _flag(
        "analysis",
        None,
        "pairs of tasks whose disentanglement is measured, such as MNIST+Signs,Letters+Emoji",
        distinct=True,
        metavar="A+B,...",
    )
    grid_points: int | None = _flag(
        "analysis",
        None,
        "coefficients from -2 to 2 on each axis of that (default: 41 for linear models, whose "
        "logits are affine in them, 11 for standard ones)",
        least=2,
        most=1001,
    )
    subset_sample: int = _flag(
        "analysis",
        2,
        "standard models, and linear ones of more than ten tasks: subsets of each size from three "
        "tasks to all but one",
        least=0,
        most=10**6,
    )
    analogies: Names | None = _flag(
        "analysis",
        None,
        "analogies by names of data sets (default: the suite's); !W adds C+W-A as a control",
        distinct=True,
        metavar="C+B-A=D[!W],...",
    )
    shots: Names = _flag(
        "analysis",
        ["1", "5", "20"],
        "training examples a class where there are few of the target",
        distinct=True,
        whole=True,
        least=1,
        most=10**6,
        metavar="N,...",
    )
    kernel_images: int = _flag(
        "analysis",
        16,
        "test examples of each task on which the kernel of the linear model is computed",
        least=2,
        most=10**5,
    )
    kernel_directions: int | None = _flag(
        "analysis",
        None,
        "random directions of the parameters that estimate the kernel (0: exact, a backward pass "
        "for each example and feature; default: exact up to 65536 of these, 128 beyond)",
        least=0,
        most=10**6,
    )
    interference_split: TestSplit = _flag(
        "analysis", "test", "split whose examples the interference matrix is measured on"
    )
    style: Style = _flag(
        "analysis",
        "screen",
        "style of figures: screen, for the page; paper, 3.25 inches wide with embedded fonts, in "
        "figures/paper",
    )
    explorer_megabytes: float = _flag(
        "analysis",
        15,
        "largest tangent explorer of the report, in MB; a sample is shown if all do not fit",
        least=0.1,
        most=10_000,
    )
    device: str | None = _flag(
        "machine", None, "cpu, cuda, cuda:1, mps (default: the best there is)", metavar="NAME"
    )
    precision: Precision = _flag(
        "machine", "fp32", "fp32, or bf16: autocast, with float32 weights and optimizer"
    )
    world_size: int = _flag(
        "machine",
        1,
        "processes to start on this machine (torchrun needs no flag)",
        least=1,
        most=1024,
    )
    port: int = _flag("machine", 12355, "port at which the processes meet", least=1, most=65_535)
    num_workers: int | None = _flag(
        "machine",
        None,
        "data-loading processes of each process (default: one a core, embedded 0)",
        least=0,
        most=1024,
    )
    cache_dir: str | None = _flag(
        "machine", None, "where caches go (default: ~/.cache/tangent-arithmetic)", path=True
    )
    exp_name: str | None = _flag(
        "machine", None, "name of the run and of its W&B group", metavar="NAME"
    )
    wandb: bool = _flag("machine", False, "log to Weights & Biases (WANDB_MODE=offline works)")
    # set by scripts, not flags
    finetuning_accuracies: dict[str, float] = _flag("", {}, "", hidden=True)

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
def settings() -> dict[str, tuple[Field[Any], Any, bool]]:
    """Each setting's field, its type without None, and whether it may be None."""
    hints = typing.get_type_hints(Config)
    found = {}
    for item in fields(Config):
        parts = typing.get_args(hints[item.name])
        optional = type(None) in parts
        kind = next(p for p in parts if p is not type(None)) if optional else hints[item.name]
        found[item.name] = (item, kind, optional)
    return found


def choices_of(item: Field[Any], kind: Any) -> tuple[str, ...]:
    """The names that a setting can have; empty if it is not restricted to some."""
    literal = typing.get_origin(kind) is Literal
    return typing.get_args(kind) if literal else tuple(item.metadata.get("choices", ()))


def _value(name: str, value: Any) -> Any:
    item, kind, optional = settings()[name]
    if value is None and optional:
        return None
    if choices := choices_of(item, kind):
        composed = item.metadata.get("composed") and str(value).partition("+")[0] in choices
        if value not in choices and not composed:
            raise refused(f"one of {', '.join(choices)}", value)
        return value
    if kind in (int, float):
        if isinstance(value, Numeral):
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
