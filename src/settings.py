"""What follows from the flags: suite, tasks, recipe, folders, device. Computed at use.

Every function takes `args`, a `Config` or any object with some of its attributes; an attribute that
is missing has the flag's default, and one that cannot be what it is raises a `UsageError`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.args import LONGEST_PART, Config, checked
from src.errors import UsageError, shown
from src.tasks import Suite, get_suite, suite_of_model

if TYPE_CHECKING:
    import torch

DEFAULT_CACHE = Path("~/.cache/tangent-arithmetic")
EVAL_BATCH = 256
LONGEST_SUFFIX = 40  # what a run adds to its model's name for its results
PREFIX = {"standard": "", "linear": "linear_", "posthoc": "posthoc_"}


def setting(args: Any, name: str) -> Any:
    """The attribute `name` of `args`, or the flag's default where `args` does not have it.

    Raises:
        UsageError: if the flag could not have this value, see `checked`.
    """
    return checked(name, getattr(args, name, getattr(Config(), name)))


def check(args: Any) -> None:
    """Checks all settings together, before a run's work starts.

    Raises:
        UsageError: for one that makes no sense, or that does not go with another.
    """
    for name in Config.__dataclass_fields__:
        setting(args, name)
    for follows in (train_datasets, eval_datasets, control_of, run_dir, results_dir, cache_dir):
        follows(args)


def suite_of(args: Any) -> Suite:
    """The suite of the run: `--suite`, or the model's."""
    return get_suite(setting(args, "suite") or suite_of_model(setting(args, "model")))


def tasks_of(args: Any) -> list[str]:
    """The tasks of the run: `--tasks`, or all of the suite."""
    suite = suite_of(args)
    return distinct_tasks(suite, "tasks", setting(args, "tasks") or suite.tasks)


def train_datasets(args: Any) -> list[str]:
    """The data sets to fine-tune on, without the suffix Val."""
    named = setting(args, "train_dataset")
    return distinct_tasks(suite_of(args), "train-dataset", named) if named else tasks_of(args)


def eval_datasets(args: Any) -> list[str]:
    """The data sets to evaluate on."""
    suite = suite_of(args)
    return [suite.check(t) for t in setting(args, "eval_datasets") or tasks_of(args)]


def control_of(args: Any) -> str:
    """The control set: `--control-dataset`, or the suite's.

    Raises:
        UsageError: if `--control-dataset` is one of the run's tasks.
    """
    suite, named = suite_of(args), setting(args, "control_dataset")
    control = suite.check(named or suite.control).removesuffix("Val")
    if named and control in tasks_of(args):
        raise UsageError(
            f"--control-dataset={control} is one of the run's tasks, and cannot be their control "
            "set; name another, or leave it out of --tasks"
        )
    return control


def distinct_tasks(suite: Suite, flag: str, names: Iterable[str]) -> list[str]:
    """The data sets of these names, which have no Val and each come once.

    Args:
        suite: that has them.
        flag: that names them, without its dashes.
        names: X or XVal.

    Raises:
        UsageError: if one is not known, or comes twice.
    """
    found: list[str] = []
    for name in names:
        task = suite.check(name).removesuffix("Val")
        if task in found:
            raise UsageError(f"--{flag} names {task} twice; expected each data set once")
        found.append(task)
    return found


def seed_of(args: Any) -> int:
    """The seed: `--seed`, or 0."""
    return int(setting(args, "seed") or 0)


def model_folder(args: Any) -> str:
    """The model's name as a folder's name, which leads nowhere else.

    Raises:
        UsageError: for a name that cannot be a folder's.
    """
    model = str(setting(args, "model"))
    name = re.sub(r"[/\\:]", "-", model)
    size = len(name.encode(errors="replace")) + LONGEST_SUFFIX
    if name in ("", ".", "..") or not name.isprintable() or size > LONGEST_PART:
        raise UsageError(f"'{shown(model)}' is no model's name, since no folder can be named so")
    return name


def run_dir(args: Any) -> Path:
    """The folder of the run's checkpoints: `--save`, or checkpoints[_SEED]/MODEL."""
    save, seed = setting(args, "save"), setting(args, "seed")
    root = "checkpoints" if seed is None else f"checkpoints_{seed}"
    return _folder("save", Path(root) / model_folder(args) if save is None else Path(save))


def results_dir(args: Any) -> Path:
    """The folder of the run's results: RESULTS/SUITE/MODEL[_seedSEED][_sampleN]."""
    seed, sample = setting(args, "seed"), setting(args, "sample")
    suffix = "" if seed is None else f"_seed{seed}"
    suffix += "" if sample is None else f"_sample{sample}"
    root = Path(setting(args, "results"))
    return _folder("results", root / suite_of(args).name / f"{model_folder(args)}{suffix}")


def zeroshot_path(args: Any) -> Path:
    """The file of the run's pre-trained encoder, theta0."""
    return run_dir(args) / "zeroshot.safetensors"


def finetuned_path(args: Any, task: str, mode: str) -> Path:
    """The file of a fine-tuned encoder; post-hoc linearisation uses the standard one."""
    name = "linear_finetuned" if mode == "linear" else "finetuned"
    return run_dir(args) / f"{task.removesuffix('Val')}Val" / f"{name}.safetensors"


def head_path(args: Any, dataset: str) -> Path:
    """The file of a zero-shot head; X and XVal share it."""
    return run_dir(args) / f"head_{dataset.removesuffix('Val')}.safetensors"


def pretrained_override(args: Any) -> str | None:
    """The one checkpoint that `--load` names, or None.

    Raises:
        UsageError: if it names several.
    """
    load = setting(args, "load") or []
    if len(load) > 1:
        raise UsageError(f"--load takes one checkpoint, got {len(load)}: {', '.join(load)}")
    return load[0] if load else None


def cache_dir(args: Any) -> Path:
    """Where caches go."""
    return _folder("cache-dir", Path(setting(args, "cache_dir") or DEFAULT_CACHE.expanduser()))


def data_root(args: Any) -> Path:
    """The root of the data sets' folders."""
    return _folder("data-location", Path(setting(args, "data_location")))


def _folder(flag: str, path: Path) -> Path:
    """The path, if a folder is there or can be made.

    Raises:
        UsageError: if there is something else at it or above it.
    """
    for place in (path, *path.parents):
        if os.path.isdir(place):  # noqa: PTH112 - unlike Path's, it never raises
            break
        if os.path.lexists(place):
            raise UsageError(f"--{flag}: expected a folder at {path}, but {place} is none")
    return path


def device_of(args: Any) -> torch.device:
    """The device: `--device`, or CUDA, MPS, CPU, the first that is there.

    Under a process group each local rank has its own CUDA device.
    """
    import torch

    from src import ddp

    named = setting(args, "device")
    if named is None:
        if torch.cuda.is_available():
            named = "cuda"
        else:
            named = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(named)
    except RuntimeError:  # as if it were one of PyTorch's that we have not
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"unknown device '{shown(named)}'; choose from cpu, cuda, cuda:N, mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device={device}, but this PyTorch sees no CUDA device; try --device=cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UsageError(
            f"--device={device}, but this PyTorch sees {torch.cuda.device_count()} CUDA devices, "
            "counted from 0"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device=mps, but this PyTorch sees no MPS device; try --device=cpu")
    if device.type == "cuda" and device.index is None and ddp.world_size() > 1:
        device = torch.device("cuda", ddp.local_rank() % torch.cuda.device_count())
    return device


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What computes in this precision: bf16 casts as it goes and leaves the weights in float32."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def autocast_of(args: Any) -> contextlib.AbstractContextManager[None]:
    """The precision of the run, see `autocast`."""
    return autocast(setting(args, "precision"), device_of(args))


def eval_batch_of(args: Any) -> int:
    """Images a batch of an evaluation."""
    return setting(args, "batch_size") or EVAL_BATCH


@dataclass(frozen=True)
class Recipe:
    """How one task is fine-tuned; each value is a flag or comes from the task table."""

    lr: float
    epochs: int
    batch_size: int
    num_grad_accumulation: int
    warmup_length: int
    wd: float
    ls: float
    precision: str = "fp32"


def recipe_for(args: Any, task: str) -> Recipe:
    """The recipe of `task`: flags where given, the task table otherwise."""
    suite = suite_of(args)
    model = str(setting(args, "model")).partition("__")[0]

    def choose(name: str, table: float) -> Any:
        value = setting(args, name)
        return table if value is None else value

    known = {**suite.tasks, **suite.related}
    epochs = known[task].epochs if task in known else 4  # the control set's
    return Recipe(
        lr=choose("lr", suite.lr),
        epochs=choose("epochs", epochs),
        batch_size=choose("batch_size", suite.batch_size.get(model, suite.batch_size[""])),
        num_grad_accumulation=choose(
            "num_grad_accumulation",
            suite.num_grad_accumulation.get(model, suite.num_grad_accumulation[""]),
        ),
        warmup_length=choose("warmup_length", suite.warmup_length),
        wd=setting(args, "wd"),
        ls=setting(args, "ls"),
        precision=setting(args, "precision"),
    )


def num_workers_of(args: Any) -> int:
    """Data-loading processes of this process: `--num-workers`, or the suite's.

    Where the suite has one a core, the processes on a machine share its cores, at least one each.
    """
    workers = setting(args, "num_workers")
    if workers is None:
        workers = suite_of(args).num_workers
    if workers is not None:
        return int(workers)
    from src import ddp

    return max(1, usable_cores() // ddp.local_world_size())


def usable_cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
