"""One run: everything that follows from the flags, resolved once.

`args` below is a `Config` or any object with some of its attributes; a missing attribute has the
flag's default. Everything else in the package takes a `Run`, or plain values.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_arithmetic.data.own.sources import plain_name
from tangent_arithmetic.data.suites import DEFAULT_CACHE, OWN_SUITE, Suite
from tangent_arithmetic.run.adoption import adopted
from tangent_arithmetic.run.args import LONGEST_PART, Config, checked
from tangent_arithmetic.run.modes import Mode, get_mode, variant
from tangent_arithmetic.run.suites import suite_of
from tangent_arithmetic.runtime import processes
from tangent_arithmetic.runtime.errors import UsageError, shown

if TYPE_CHECKING:
    import torch

    from tangent_arithmetic.data.own.budget import Budget
    from tangent_arithmetic.data.registry import SuiteData
    from tangent_arithmetic.runtime.compute import Compute
    from tangent_arithmetic.training.recipe import Recipe

logger = logging.getLogger(__name__)

EVAL_BATCH = 256
LONGEST_SUFFIX = 40  # characters that a run adds to its model's name for its results


@dataclass(frozen=True)
class Run:
    """One run. Every property is computed once; none of them changes.

    Attributes:
        config: the flags' values, checked.
    """

    config: Config

    @classmethod
    def of(cls, args: object) -> Run:
        """The run of these settings.

        Args:
            args: a `Run`, a `Config`, or any object with some of a config's attributes.

        Raises:
            UsageError: for a value that its flag cannot have.
        """
        if isinstance(args, Run):
            return args
        defaults = Config()
        names = [field.name for field in fields(Config)]
        values = {n: checked(n, getattr(args, n, getattr(defaults, n))) for n in names}
        return cls(adopted(Config(**values)))

    def with_(self, **settings: Any) -> Run:
        """A run that differs in some settings."""
        return Run.of(replace(self.config, **settings))

    def at_most(self, count: int) -> Run:
        """The run on at most so many examples of each split, or fewer if `--sample` says so."""
        return self.with_(sample=min(count, self.config.sample or count))

    def check(self) -> Run:
        """Resolves all that can be wrong with the flags together, before the work starts.

        Raises:
            UsageError: for one that makes no sense, or that does not go with another.
        """
        _ = (self.train_datasets, self.eval_datasets, self.control_set)
        _ = (self.folder, self.results, self.cache)
        low, high = self.config.coef_min, self.config.coef_max
        if low > high:
            raise UsageError(
                f"--coef-min={low:g} is above --coef-max={high:g}; expected a range, such as "
                "--coef-min=0.5 --coef-max=1"
            )
        return self

    @property
    def model(self) -> str:
        """The model's name."""
        return self.config.model

    @cached_property
    def mode(self) -> Mode:
        """The mode.

        Raises:
            UsageError: if `--finetuning-mode` is not given.
        """
        mode = get_mode(str(self.config.finetuning_mode))
        if not mode.edits or mode.trained_by is not None:
            return mode
        return variant(mode, self.config.objective, self.config.trainable)

    @cached_property
    def suite(self) -> Suite:
        """The suite that the flags name, see `run.suites.suite_of`."""
        return suite_of(self.config)

    @cached_property
    def tasks(self) -> list[str]:
        """`--tasks`, or all tasks of the suite.

        Raises:
            UsageError: if there are none.
        """
        tasks = distinct_tasks(self.suite, "tasks", self.config.tasks or self.suite.tasks)
        if not tasks:
            raise UsageError(
                f"suite {self.suite.name} has no tasks; name some with --tasks={{NAME=SOURCE,...}}"
            )
        return tasks

    @cached_property
    def train_datasets(self) -> list[str]:
        """The data sets to fine-tune on, without the suffix Val."""
        named = self.config.train_dataset
        return distinct_tasks(self.suite, "train-dataset", named) if named else self.tasks

    @cached_property
    def eval_datasets(self) -> list[str]:
        """The data sets to evaluate on."""
        names = self.config.eval_datasets or self.tasks
        return [self.suite.check(plain_name(name)) for name in names]

    @property
    def control(self) -> str:
        """The control set, which must exist.

        Raises:
            UsageError: if there is none, or it is one of the run's tasks.
        """
        if self.control_set is None:
            raise UsageError(
                f"suite {self.suite.name} has no control set, whose accuracy negation must "
                "preserve; name one with --control-dataset=NAME, or "
                "--control-dataset=NAME=SOURCE, or as control in the suite's file"
            )
        if self.control_set in self.tasks:
            raise UsageError(
                f"--tasks names {self.control_set}, which is the control set; leave it out, or "
                "name another one with --control-dataset"
            )
        return self.control_set

    @cached_property
    def control_set(self) -> str | None:
        """The control set: `--control-dataset`, or the suite's; None if there is none.

        Raises:
            UsageError: if `--control-dataset` is one of the run's tasks.
        """
        named = self.config.control_dataset
        name = self.suite.control if named is None else plain_name(named)
        if name is None:
            return None
        control = self.suite.check(name).removesuffix("Val")
        if named and control in self.tasks:
            raise UsageError(
                f"--control-dataset={control} is one of the run's tasks, and cannot be their "
                "control set; name another, or leave it out of --tasks"
            )
        return control

    @cached_property
    def evaluated(self) -> list[str]:
        """The data sets to evaluate on, and `--control-dataset` if it is set.

        Raises:
            UsageError: if the latter is one of the former.
        """
        flag, names = self.config.control_dataset, self.eval_datasets
        control = flag and plain_name(flag)
        if control in names:
            raise UsageError(
                f"--control-dataset={control} is one of the data sets that are evaluated anyway; "
                "leave it out of one of them"
            )
        return [*names, *([control] if control else [])]

    def others(self, task: str) -> list[str]:
        """The data sets whose images an objective keeps unchanged: `--others`, but for `task`.

        By default the run's tasks and its control set.

        Raises:
            UsageError: if there are none.
        """
        names = [*self.tasks, *([self.control_set] if self.control_set else [])]
        if self.config.others:
            names = distinct_tasks(self.suite, "others", self.config.others)
        if not (others := [name for name in dict.fromkeys(names) if name != task]):
            raise UsageError(
                f"{self.mode.label} needs images of other data sets than {task}, got none; name "
                "some with --others=NAME=FOLDER, a folder of folders of any pictures"
            )
        return others

    def others_batch_size(self, task: str) -> int:
        """Images of other data sets in a step: `--others-batch-size`, or half the labelled ones."""
        recipe = self.recipe(task)
        labelled = recipe.batch_size * recipe.num_grad_accumulation
        return self.config.others_batch_size or max(labelled // 2, 1)

    @property
    def seed(self) -> int:
        """`--seed`, or 0."""
        return self.config.seed or 0

    @cached_property
    def folder(self) -> Path:
        """The folder of the run's checkpoints: `--save`, or checkpoints[_SEED]/MODEL."""
        save, seed = self.config.save, self.config.seed
        root = "checkpoints" if seed is None else f"checkpoints_{seed}"
        return _folder("save", Path(root) / self._model_folder if save is None else Path(save))

    @cached_property
    def results(self) -> Path:
        """The folder of the run's results: RESULTS/SUITE/MODEL[_seedSEED][_sampleN]."""
        seed = "" if self.config.seed is None else f"_seed{self.config.seed}"
        name = f"{self._model_folder}{seed}{self.sampled}"
        return _folder("results", Path(self.config.results) / self.suite.name / name)

    @property
    def sampled(self) -> str:
        """What `--sample` adds to the names of results: "_sampleN", or nothing."""
        return "" if self.config.sample is None else f"_sample{self.config.sample}"

    @property
    def examples(self) -> str:
        """What `--sample` adds to captions: ", N examples of each split", or nothing."""
        count = self.config.sample
        return "" if count is None else f", {count} examples of each split"

    @cached_property
    def _model_folder(self) -> str:
        """The model's name as that of a folder directly below another."""
        name = re.sub(r"[/\\:]", "-", self.model)
        size = len(name.encode(errors="replace")) + LONGEST_SUFFIX
        if name in ("", ".", "..") or not name.isprintable() or size > LONGEST_PART:
            raise UsageError(
                f"invalid model name '{shown(self.model)}': no folder can have this name"
            )
        return name

    @property
    def zeroshot_path(self) -> Path:
        """The file of the pre-trained encoder, theta0."""
        return self.folder / "zeroshot.safetensors"

    def finetuned_path(self, task: str, mode: str) -> Path:
        """The file of the fine-tuned encoder that a mode starts from."""
        name = f"{get_mode(mode).checkpoint}.safetensors"
        return self.folder / f"{task.removesuffix('Val')}Val" / name

    def head_path(self, dataset: str) -> Path:
        """The file of a zero-shot head; X and XVal share it."""
        return self.folder / f"head_{dataset.removesuffix('Val')}.safetensors"

    @cached_property
    def load(self) -> str | None:
        """The checkpoint that `--load` names, or None.

        Raises:
            UsageError: if it names several.
        """
        load = self.config.load or []
        if len(load) > 1:
            raise UsageError(f"--load takes one checkpoint, got {len(load)}: {', '.join(load)}")
        return load[0] if load else None

    @cached_property
    def cache(self) -> Path:
        """The folder of caches."""
        return _folder("cache-dir", Path(self.config.cache_dir or DEFAULT_CACHE.expanduser()))

    @property
    def feature_cache(self) -> Path | None:
        """The folder where features are kept; None with `--no-feature-cache`."""
        return self.cache / "features" if self.config.feature_cache else None

    @cached_property
    def data(self) -> SuiteData:
        """The suite's data sets."""
        from tangent_arithmetic.data.registry import SuiteData

        return SuiteData(
            self.suite,
            location=_folder("data-location", Path(self.config.data_location)),
            cache=self.cache,
            source=self.config.data_source,
            sample=self.config.sample,
            batch_size=self.config.batch_size or EVAL_BATCH,
            num_workers=self.num_workers,
        )

    @cached_property
    def compute(self) -> Compute:
        """The device and the precision."""
        from tangent_arithmetic.runtime.compute import Compute, find_device

        return Compute(find_device(self.config.device), self.config.precision)

    @property
    def device(self) -> torch.device:
        """The device: `--device`, or CUDA, MPS, CPU, the first available."""
        return self.compute.device

    @cached_property
    def num_workers(self) -> int:
        """Data-loading processes of this process: `--num-workers`, or the suite's.

        Where the suite has one a core, the processes on a machine share its cores, at least one
        each.
        """
        workers = self.config.num_workers
        if workers is None:
            workers = self.suite.num_workers
        if workers is not None:
            return workers
        from tangent_arithmetic.runtime import ddp

        return max(1, processes.usable_cores() // ddp.local_world_size())

    def recipe(self, task: str) -> Recipe:
        """How a task is fine-tuned: flags set explicitly, the suite's recipe otherwise."""
        from tangent_arithmetic.training.recipe import Recipe, fast

        config, suite = self.config, self.suite
        model = self.model.partition("__")[0]
        recipe = Recipe(
            lr=suite.lr,
            epochs=0,
            batch_size=suite.batch_size.get(model, suite.batch_size[""]),
            num_grad_accumulation=suite.num_grad_accumulation.get(
                model, suite.num_grad_accumulation[""]
            ),
            warmup_length=suite.warmup_length,
            wd=config.wd,
            ls=config.ls,
            precision=config.precision,
        )
        flags = {field.name: getattr(config, field.name) for field in fields(recipe)}
        given = {name: value for name, value in flags.items() if value is not None}
        epochs = given.get("epochs", suite.task(task).epochs)
        if epochs is None or task in suite.sets or suite.name == OWN_SUITE:
            plain = replace(recipe, **given)
            planned = self.budget(task, plain.batch_size * plain.num_grad_accumulation, epochs)
            epochs, warmup = planned.epochs, planned.warmup_length
            recipe = replace(recipe, warmup_length=warmup)
        if config.recipe == "fast":
            recipe = fast(recipe, self.mode.linear)
        return replace(recipe, **{"epochs": epochs, **given})

    def budget(self, task: str, step_size: int, epochs: int | None = None) -> Budget:
        """How long a data set is trained on whose epochs no table states; said once in the log.

        Args:
            task: the data set.
            step_size: images per optimizer step.
            epochs: passes over the training images; None to follow from their number.
        """
        from tangent_arithmetic.data.own.budget import budget

        images = len(self.data.dataset(f"{task}Val").train)
        planned = budget(images, step_size, self.suite, epochs)
        if epochs is None:
            _log_budget(task, planned)
        return planned


@lru_cache  # logs each case once
def _log_budget(task: str, planned: Budget) -> None:
    logger.info("%s: %s", task, planned)


def distinct_tasks(suite: Suite, flag: str, names: Iterable[str]) -> list[str]:
    """The data sets of these names, without Val and each once.

    Args:
        suite: the suite that has them.
        flag: the flag that names them, without its dashes.
        names: X, XVal or X=SOURCE.

    Raises:
        UsageError: if one is unknown, or comes twice.
    """
    found: list[str] = []
    for name in names:
        task = suite.check(plain_name(name)).removesuffix("Val")
        if task in found:
            raise UsageError(f"--{flag} names {task} twice; expected each data set once")
        found.append(task)
    return found


def _folder(flag: str, path: Path) -> Path:
    """The path, if there is a folder at it or one can be made there.

    Raises:
        UsageError: if something else is at it or above it.
    """
    for place in (path, *path.parents):
        if os.path.isdir(place):  # noqa: PTH112 - unlike Path's, it never raises
            break
        if os.path.lexists(place):
            raise UsageError(f"--{flag}: expected a folder at {path}, but {place} is not one")
    return path
