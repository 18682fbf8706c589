"""Task pools, which evaluate merged models: tasks of our suites, or data sets of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.sweeps import Split, logits_at
from tangent_arithmetic.arithmetic.tally import Tally, scores
from tangent_arithmetic.data.base import Pictures, SubsetPictures
from tangent_arithmetic.data.hub import HubSet
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.encoders.base import BUILT, Encoder, ModuleEncoder, is_encoder, is_linear
from tangent_arithmetic.encoders.heads import zeroshot_weights
from tangent_arithmetic.encoders.images import VISUAL, ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.published import huggingface
from tangent_arithmetic.merging.built import check_built
from tangent_arithmetic.merging.examples import Examples, Part
from tangent_arithmetic.merging.pool import Model, ModelPool
from tangent_arithmetic.merging.results import Record, record_of
from tangent_arithmetic.merging.stream import Merge
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import classification_head, split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError

State = Mapping[str, Tensor]
MEASURES = ("accuracy", "loss")
OTHER_NAMES = {"mnist": "MNIST", "svhn": "SVHN"}  # of the same sets on the hub
CHOICE = 37  # in the seed of the choice of images
OTHER_NAMES |= {"tanganke/cifar10": "CIFAR10", "tanganke/cifar100": "CIFAR100"}
OTHER_NAMES |= {"1aurent/PatchCamelyon": "PCAM", "clip-benchmark/wds_fer2013": "FER2013"}
# read from the hub as they are there, with our prompts
PROMPTS = {"tanganke/emnist_letters": "EMNISTLetters"}
SUITE = "clip20"  # has all public data sets


@dataclass(frozen=True)
class Task:
    """One data set of a pool.

    Attributes:
        pictures: (validation) -> the images of the validation or the test split; None if there is
            no validation split.
        head: makes the classification head.
    """

    pictures: Callable[[bool], Pictures | None]
    head: Callable[[], nn.Module]


class TaskPool:
    """Data sets with their heads, on which encoders are evaluated.

    Args:
        run: gives device, precision, batch size and workers.
        tasks: name -> data set.
        fast_dev_run: evaluate one batch per task, as a smoke test.
    """

    def __init__(self, run: Run, tasks: Mapping[str, Task], fast_dev_run: bool = False) -> None:
        self.run, self.tasks, self.fast_dev_run = run, dict(tasks), fast_dev_run
        self._head = cache(lambda name: self.tasks[name].head().to(run.device).eval())

    def encoder(self, pool: ModelPool, state: State) -> Encoder:
        """The encoder of the pool's kind with these weights.

        Raises:
            UsageError: if the pool's models are not encoders.
        """
        encoder = pool.build(dict(state))
        if is_encoder(encoder):
            return encoder
        raise UsageError(
            f"expected encoders, got other models ({pool.base.place}); merge them with "
            "taskpool=dummy, which evaluates nothing"
        )

    def record(self, merge: Merge, auto: bool) -> Record | None:
        """The place of a merge among the results of a run; None if it is not stored there."""
        return None

    def examples(self, pool: ModelPool | Mapping[str, Model]) -> Examples:
        """The models of a pool on images of the tasks of their names.

        Raises:
            UsageError: if a model has no task here.
        """
        return PoolExamples(ModelPool.of(pool), self)

    def split(
        self, encoder: Encoder, name: str, validation: bool, count: int | None = None, seed: int = 0
    ) -> Split:
        """Images of a task with its head, preprocessed for an encoder.

        Args:
            encoder: the encoder.
            name: the task.
            validation: whether they are of the validation split, else of the test split.
            count: number of images, chosen at random; all if None, or if there are no more.
            seed: of the choice.

        Raises:
            UsageError: if the task has no such split, or it is empty.
        """
        batches = self._batches(encoder, name, validation)
        if count is not None and count < len(batches.pictures):
            order = np.random.default_rng([seed, CHOICE]).permutation(len(batches.pictures))
            chosen = SubsetPictures(batches.pictures, np.sort(order[:count]).tolist())
            batches = replace(batches, pictures=chosen)
        return Split(name, self._head(name), batches, self.run.compute)

    def _batches(self, encoder: Encoder, name: str, validation: bool) -> EvalBatches:
        pictures = self.tasks[name].pictures(validation)
        if pictures is None:
            raise UsageError(
                f"{name} has no validation split, which scaling_factor=auto and methods that need "
                "data use; give a number, or choose another method"
            )
        if not len(pictures):
            split = "validation" if validation else "test"
            raise UsageError(f"the {split} split of {name} is empty")
        size = self.run.data.batch_size
        if self.fast_dev_run:
            pictures = SubsetPictures(pictures, range(min(size, len(pictures))))
        return EvalBatches(pictures, encoder.val_preprocess, size, self.run.num_workers, name)

    def logits(
        self, encoder: Encoder, name: str, tau: State, coefs: Sequence[float], validation: bool
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Logits and labels on one task at theta + coef * tau, see `logits_at`.

        Yields:
            The index of the coefficient, logits (batch, classes), labels.
        """
        batches, head = self._batches(encoder, name, validation), self._head(name)
        points = [[(coef, tau)] if tau else [] for coef in coefs]
        yield from logits_at(encoder, points, head, batches, self.run.compute)

    def measure(
        self, encoder: Encoder, name: str, tau: State, coefs: Sequence[float], validation: bool
    ) -> list[dict[str, float]]:
        """Main metric and mean loss on one task at theta + coef * tau for each coefficient.

        The metric, "accuracy", is mean average precision where an image has several labels, and
        the loss binary cross-entropy. The encoder is reset to theta afterwards, even after an
        error.
        """
        tallies, losses = [Tally() for _ in coefs], np.zeros(len(coefs))
        for i, logits, labels in self.logits(encoder, name, tau, coefs, validation):
            tallies[i].add(logits, labels)
            losses[i] += float(_loss(logits, labels))
        return [
            {"accuracy": main_of(found), "loss": float(loss / n), "num_images": n}
            for found, loss in zip(scores(tallies), losses, strict=True)
            if (n := int(found["num_images"]))
        ]

    def evaluate(self, encoder: Encoder) -> dict[str, dict[str, float]]:
        """Accuracy in [0, 1] and loss of each task, and their average.

        Returns:
            {task: {"accuracy", "loss", "num_images"}, "average": {"accuracy", "loss"}}.
        """
        report = {name: self.measure(encoder, name, {}, [1.0], False)[0] for name in self.tasks}
        mean = {k: float(np.mean([row[k] for row in report.values()])) for k in MEASURES}
        return {**report, "average": mean}

    def sweep(self, encoder: Encoder, tau: State, coefs: Sequence[float]) -> dict[str, list[float]]:
        """Validation accuracy of each task at theta + coef * tau, a list over coefficients."""
        return {
            name: [point["accuracy"] for point in self.measure(encoder, name, tau, coefs, True)]
            for name in self.tasks
        }


class PoolExamples:
    """The models of a pool on images of the tasks of their names, see `merging.examples`.

    Args:
        pool: the models.
        tasks: the tasks.

    Raises:
        UsageError: if a model has no task.
    """

    def __init__(self, pool: ModelPool, tasks: TaskPool) -> None:
        self.pool, self.tasks = pool, tasks
        if missing := [name for name in pool.model_names if name not in tasks.tasks]:
            raise UsageError(
                "the method runs each model on images of the task of its name, but the task pool "
                f"has no {', '.join(missing)}; its tasks are {', '.join(tasks.tasks)}"
            )

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return self.pool.model_names

    def encoder(self) -> ModuleEncoder:
        """A new encoder with the base model's weights.

        Raises:
            UsageError: if the models are linearised, or have other names than the encoder.
        """
        encoder = self.tasks.encoder(self.pool, dict(self.pool.base.tensors))
        if is_linear(encoder):
            raise UsageError(
                "the method runs standard encoders, and these are linearised; "
                "`tangent-arithmetic combine` solves for their coefficients exactly"
            )
        if encoder.weights().keys() != self.pool.base.outline.keys():
            raise UsageError(
                f"{self.pool.base.place} names its weights in another way than the encoder that "
                "runs it, so that methods which run models cannot merge it; convert "
                "the models to checkpoints of this project first, see docs/checkpoints.md"
            )
        assert isinstance(encoder, ModuleEncoder)
        return encoder.eval().to(self.tasks.run.device)

    def weights(self, model: str) -> State:
        """The weights of a model, read on demand."""
        return self.pool.weights(model).tensors

    def split(
        self,
        encoder: ModuleEncoder,
        model: str,
        count: int | None = None,
        seed: int = 0,
        part: Part = "validation",
    ) -> Split:
        """Images of a model's task, with its head."""
        return self.tasks.split(encoder, model, part == "validation", count, seed)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the images' losses; for several labels an image the mean over the classes."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="sum")
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return each.mean(dim=1).sum()


class RunTaskPool(TaskPool):
    """The tasks of a run, with its heads.

    Args:
        run: the run.
        fast_dev_run: evaluate one batch per task.
    """

    def __init__(self, run: Run, fast_dev_run: bool = False) -> None:
        def task(name: str) -> Task:
            return Task(
                lambda validation: run.data.evaluated(f"{name}{'Val' if validation else ''}").test,
                lambda: classification_head(run, name),
            )

        super().__init__(run, {name: task(name) for name in run.tasks}, fast_dev_run)

    def sweep(self, encoder: Encoder, tau: State, coefs: Sequence[float]) -> dict[str, list[float]]:
        """As `TaskPool.sweep`; for a linear encoder from one pass over the images."""
        if self.fast_dev_run or not is_linear(encoder):
            return super().sweep(encoder, tau, coefs)
        step = {name: tau[name] for name in encoder.theta0()}
        splits = {name: split_of(self.run, encoder, f"{name}Val") for name in self.tasks}
        return {name: split.sweep(encoder, step, coefs) for name, split in splits.items()}


class SuiteTaskPool(RunTaskPool):
    """The tasks of one of our suites, with the heads of a run.

    Args:
        model: the run's model.
        run: the run's folder; None for `checkpoints/MODEL`. In `checkpoints_S/MODEL`, S is its
            seed.
        tasks: names of tasks; None for all of the suite.
        fast_dev_run: evaluate one batch per task.
        results: the root folder of results in which merges of the run's models are stored; None
            to store none.
        **settings: further settings by the names of the flags, such as `data_location`, or
            `sample`, the number of images of each split to evaluate on.
    """

    def __init__(
        self,
        model: str,
        run: str | None = None,
        tasks: Sequence[str] | None = None,
        fast_dev_run: bool = False,
        results: str | None = None,
        **settings: Any,
    ) -> None:
        names = None if tasks is None else list(tasks)
        if seed := re.fullmatch(r"checkpoints_(\d+)", Path(run or "").parent.name):
            settings.setdefault("seed", int(seed[1]))
        if results is not None:
            settings["results"] = results
        own = Run.of(Config(model=model, save=run, tasks=names, **settings))
        self.has_results = results is not None and not fast_dev_run

        super().__init__(own, fast_dev_run)

    def record(self, merge: Merge, auto: bool) -> Record | None:
        """The place of a merge among the results of the run; None if it is not stored there."""
        return record_of(self.run, merge, auto) if self.has_results else None


@dataclass(frozen=True)
class HubRows:
    """A data set in a configuration: the arguments of `datasets.load_dataset`.

    Attributes:
        path: the repository, or a folder that the library can load.
        config: the name of its configuration.
        split: the name of the split.
        validation: whether it is the held-out tenth of the training split.
    """

    path: str
    config: str | None
    split: str
    validation: bool = False

    def known(self) -> str | None:
        """The name of the data set in our registry, or None."""
        from tangent_arithmetic.data.clip20 import PUBLIC_SETS

        names = {entry.hub.repo: name for name, entry in PUBLIC_SETS.items() if entry.hub}
        return {**names, **OTHER_NAMES}.get(self.path)

    def hub(self) -> HubSet | None:
        """How our registry reads these rows from the hub; None if it does not."""
        from tangent_arithmetic.data.clip20 import PUBLIC_SETS

        known = self.known()
        hub = PUBLIC_SETS[known].hub if known else None
        if hub is None or hub.repo == self.path:
            return hub
        return replace(hub, repo=self.path, test="test")

    def ours(self) -> str | None:
        """The set in our registry whose test split or held-out tenth this is, or None."""
        hub = self.hub()
        config, tested = (None, "test") if hub is None else (hub.config, hub.test)
        same = self.config in (None, config) and (self.validation or self.split == tested)
        return self.known() if same else None


class CLIPVisionModelTaskPool(TaskPool):
    """Image classification with CLIPs of Hugging Face, as FusionBench's pool of this name.

    Test splits of our registry come from local folders if they exist, else from the hub; their
    other splits and configurations always from the hub, with our class names and prompts. Other
    sets take their classes from the label column, with the prompt "a photo of a {}.". The letters
    of EMNIST are always the hub's, since ours are upright, with our prompt.

    Args:
        test_datasets: name -> data set.
        base_model: the complete CLIP that provides the text tower for the heads, and the image
            projection.
        fast_dev_run: evaluate one batch per task.
        **settings: further settings by the names of the flags.

    Raises:
        UsageError: for a split that cannot be evaluated.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, HubRows],
        base_model: str,
        fast_dev_run: bool = False,
        **settings: Any,
    ) -> None:
        from tangent_arithmetic.merging.clip_text import read_text_tower

        self.base_model = base_model
        run = Run.of(Config(model="ViT-B-32", suite=SUITE, **settings))
        text = cache(lambda: read_text_tower(base_model).to(run.device))

        def head(classes: Sequence[str], prompts: Sequence[Callable[[str], str]]) -> nn.Module:
            weights = zeroshot_weights(text(), classes, prompts, run.device)
            return ClassificationHead(True, weights.cpu(), classnames=classes)

        def task(name: str, rows: HubRows) -> Task:
            if (ours := rows.ours()) is None:
                return generic_task(name, rows, head)
            split = "Val" if rows.validation else ""
            return Task(
                lambda validation: run.data.dataset(f"{ours}{'Val' if validation else split}").test,
                lambda: head(run.data.dataset(ours).classnames, get_templates(ours, SUITE)),
            )

        tasks = {name: task(name, rows) for name, rows in test_datasets.items()}
        super().__init__(run, tasks, fast_dev_run)

    def encoder(self, pool: ModelPool, state: State) -> Encoder:
        """The vision tower with the base model's projection, as an `ImageEncoder`."""
        if pool.base.is_encoder or any(name.startswith(VISUAL) for name in state):
            return super().encoder(pool, state)
        from tangent_arithmetic.encoders.published.formats import from_huggingface
        from tangent_arithmetic.merging.weights import open_weights

        base = open_weights(self.base_model)
        if huggingface.PROJECTION not in base.outline or base.folder is None:
            raise UsageError(
                f"base_model={self.base_model} has no {huggingface.PROJECTION}; expected the "
                "folder of a complete CLIP (CLIPModel)"
            )
        config = huggingface.read_config(base.folder)
        own = replace(base, facts={BUILT: huggingface.built(base.folder, config)})
        check_built(pool.base, own, pool.base_name, f"base_model={self.base_model}")
        proj = base.read(huggingface.PROJECTION).T.float()
        read = from_huggingface(base.folder, state, config, None, lambda: {f"{VISUAL}proj": proj})
        encoder = ImageEncoder.without_weights(str(read.info["model"]))
        encoder.adopt(read.info.get(BUILT), base.folder)
        encoder.load_weights(read.theta)
        return encoder


def generic_task(
    name: str,
    rows: HubRows,
    head: Callable[[Sequence[str], Sequence[Callable[[str], str]]], nn.Module],
) -> Task:
    """A split of the hub that is none of our registry, with the classes of its label column.

    Raises:
        UsageError: for a held-out tenth, or if the labels of a set in our registry have no names on
            the hub.
    """
    from tangent_arithmetic.data.hub import classes_of, load_rows, pictures_of

    known, hub_set = rows.known(), rows.hub()
    if rows.validation:
        raise UsageError(
            f"{name} holds out a tenth of {rows.path} ({rows.config}), which is no data set of our "
            "registry; expected one of docs/data.md, or a split of its own"
        )
    if known and hub_set is None:
        raise UsageError(
            f"{name} names the split {rows.split} of {rows.path} ({rows.config}), where labels "
            "have no names; expected split=test, or the held-out tenth, and no configuration"
        )

    def read() -> tuple[Pictures, tuple[str, ...]]:
        table = load_rows(name, rows.path, rows.config, rows.split)
        hub = hub_set or HubSet(rows.path, classes_of(name, rows.path, table))
        return pictures_of(name, hub, table), hub.classnames

    prompts: Sequence[Callable[[str], str]] = ["a photo of a {}.".format]
    if prompted := known or PROMPTS.get(rows.path):
        prompts = get_templates(prompted, SUITE)
    return Task(
        lambda validation: None if validation else read()[0], lambda: head(read()[1], prompts)
    )
