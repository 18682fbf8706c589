"""What a merged model is evaluated on: the tasks of our suites, or sets of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.sweeps import logits_at
from tangent_arithmetic.data.base import Pictures, SubsetPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.templates import get_templates
from tangent_arithmetic.encoders.heads import zeroshot_weights
from tangent_arithmetic.encoders.images import VISUAL, ClassificationHead, ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.published import huggingface
from tangent_arithmetic.merging.pool import ModelPool
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import classification_head, split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import ENCODERS

State = Mapping[str, Tensor]
ALSO = {  # other names of the same sets on the hub
    "mnist": "MNIST", "svhn": "SVHN", "tanganke/cifar10": "CIFAR10",
    "tanganke/cifar100": "CIFAR100",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One data set of a pool.

    Attributes:
        pictures: gives the pictures to report on, or, with True, those to choose a coefficient on;
            None where there are none of the latter.
        head: gives the classification head.
    """

    pictures: Callable[[bool], Pictures | None]
    head: Callable[[], nn.Module]


class TaskPool:
    """Data sets with their heads, on which encoders are evaluated.

    Args:
        run: gives device, precision, batch size and workers.
        tasks: name -> data set.
        fast_dev_run: whether one batch of each is enough, to see whether all works.
    """

    def __init__(self, run: Run, tasks: Mapping[str, Task], fast_dev_run: bool = False) -> None:
        self.run, self.tasks, self.fast_dev_run = run, dict(tasks), fast_dev_run
        self._heads: dict[str, nn.Module] = {}

    def encoder(self, pool: ModelPool, state: State) -> Any:
        """The encoder of the pool's kind with these weights.

        Raises:
            UsageError: if the pool's models are not image encoders.
        """
        found = pool.build(dict(state))
        if isinstance(found, nn.Module):
            return found
        raise UsageError(
            f"the models of the pool are no image encoders ({pool.weights(pool.base_name).place}); "
            "they can be merged with taskpool=dummy, not evaluated"
        )

    def _batches(self, encoder: Any, name: str, validation: bool) -> EvalBatches:
        pictures = self.tasks[name].pictures(validation)
        if pictures is None:
            raise UsageError(
                f"{name} has no validation split here, on which scaling_factor=auto is chosen; "
                "name a number"
            )
        if not len(pictures):
            split = "validation" if validation else "test"
            raise UsageError(f"the {split} split of {name} has no pictures")
        size = self.run.data.batch_size
        if self.fast_dev_run:
            pictures = SubsetPictures(pictures, range(min(size, len(pictures))))
        return EvalBatches(pictures, encoder.val_preprocess, size, self.run.num_workers, name)

    def _head(self, name: str) -> nn.Module:
        if name not in self._heads:
            self._heads[name] = self.tasks[name].head().to(self.run.device).eval()
        return self._heads[name]

    def measure(
        self,
        encoder: Any,
        name: str,
        tau: State,
        coefs: Sequence[float],
        validation: bool,
    ) -> list[dict[str, float]]:
        """Accuracy and mean cross-entropy at theta + coef * tau for each coefficient.

        Whatever happens, the encoder is at theta again in the end.
        """
        batches = self._batches(encoder, name, validation)
        hits, losses, counts = (np.zeros(len(coefs)) for _ in range(3))
        points = [[(coef, tau)] if tau else [] for coef in coefs]
        head = self._head(name)
        for i, logits, labels in logits_at(encoder, points, head, batches, self.run.compute):
            hits[i] += int((logits.argmax(dim=1) == labels).sum())
            losses[i] += float(F.cross_entropy(logits, labels, reduction="sum"))
            counts[i] += len(labels)
        return [
            {"accuracy": float(hit / n), "loss": float(loss / n), "num_images": int(n)}
            for hit, loss, n in zip(hits, losses, counts, strict=True)
        ]

    def evaluate(self, encoder: Any) -> dict[str, dict[str, float]]:
        """Accuracy in [0, 1] and loss of each task, and their average.

        Returns:
            {task: {"accuracy", "loss", "num_images"}, "average": {"accuracy", "loss"}}.
        """
        report = {name: self.measure(encoder, name, {}, [1.0], False)[0] for name in self.tasks}
        average = {
            key: float(np.mean([found[key] for found in report.values()]))
            for key in ("accuracy", "loss")
        }
        return {**report, "average": average}

    def sweep(self, encoder: Any, tau: State, coefs: Sequence[float]) -> dict[str, list[float]]:
        """Validation accuracy of each task at theta + coef * tau, a list over coefficients."""
        return {
            name: [found["accuracy"] for found in self.measure(encoder, name, tau, coefs, True)]
            for name in self.tasks
        }


class SuiteTaskPool(TaskPool):
    """The tasks of one of our suites, with the heads of a run.

    Args:
        model: the run's model.
        run: the run's folder; None for `checkpoints/MODEL`.
        tasks: names of tasks; None for all of the suite.
        fast_dev_run: one batch of each only.
        **settings: further settings by the names of the flags, such as `data_location`.
    """

    def __init__(
        self,
        model: str,
        run: str | None = None,
        tasks: Sequence[str] | None = None,
        fast_dev_run: bool = False,
        **settings: Any,
    ) -> None:
        names = None if tasks is None else list(tasks)
        own = Run.of(Config(model=model, save=run, tasks=names, **settings))

        def pictures(name: str) -> Callable[[bool], Pictures]:
            return lambda validation: own.data.dataset(f"{name}{'Val' if validation else ''}").test

        def head(name: str) -> Callable[[], nn.Module]:
            return lambda: classification_head(own, name)

        found = {name: Task(pictures(name), head(name)) for name in own.tasks}
        super().__init__(own, found, fast_dev_run)

    def sweep(self, encoder: Any, tau: State, coefs: Sequence[float]) -> dict[str, list[float]]:
        """As `TaskPool.sweep`; of a linear encoder from one pass over the pictures."""
        if self.fast_dev_run or not isinstance(encoder, LinearizedImageEncoder):
            return super().sweep(encoder, tau, coefs)
        step = {name: tau[name] for name in encoder.model.theta()}
        splits = [split_of(self.run, encoder, f"{name}Val") for name in self.tasks]
        found = [split.sweep(encoder, step, coefs) for split in splits]
        return dict(zip(self.tasks, found, strict=True))


@dataclass(frozen=True)
class HubRows:
    """A data set as a configuration names it: the arguments of `datasets.load_dataset`.

    Attributes:
        path: the repository, or a folder that the library can load.
        config: which of its configurations.
        split: which split.
        validation: whether the seeded tenth of the training split is meant.
    """

    path: str
    config: str | None
    split: str
    validation: bool = False

    def known(self) -> str | None:
        """The name of the set in our registry; None for another one."""
        from tangent_arithmetic.data.clip8 import CLIP8_SETS

        names = {entry.hub.repo: name for name, entry in CLIP8_SETS.items() if entry.hub}
        return {**names, **ALSO}.get(self.path)


class CLIPVisionModelTaskPool(TaskPool):
    """Image classification by CLIPs of Hugging Face, as FusionBench's pool of this name.

    Data sets that we know are taken from local folders where they are there, else from the hub; for
    others classes are those of the label column, in the prompt "a photo of a {}.".

    Args:
        test_datasets: name -> rows.
        base_model: the whole CLIP whose text tower makes the heads, and whose projection is used.
        fast_dev_run: one batch of each only.
        **settings: further settings by the names of the flags.
    """

    def __init__(
        self,
        test_datasets: Mapping[str, HubRows],
        base_model: str,
        fast_dev_run: bool = False,
        **settings: Any,
    ) -> None:
        from tangent_arithmetic.merging.clip_text import HuggingFaceText

        self.base_model = base_model
        run = Run.of(Config(model="ViT-B-32", suite="clip8", **settings))
        text = HuggingFaceText(base_model, run.device)

        def head(classes: Sequence[str], prompts: Sequence[Callable[[str], str]]) -> nn.Module:
            weights = zeroshot_weights(text(), classes, prompts, run.device)
            return ClassificationHead(True, weights.cpu(), classnames=classes)

        def task(name: str, rows: HubRows) -> Task:
            ours = rows.known()
            if ours is None:
                return generic_task(name, rows, head)
            split = "Val" if rows.validation or rows.split != "test" else ""

            def pictures(validation: bool) -> Pictures:
                return run.data.dataset(f"{ours}{'Val' if validation else split}").test

            return Task(
                pictures,
                lambda: head(run.data.dataset(ours).classnames, get_templates(ours)),
            )

        tasks = {name: task(name, rows) for name, rows in test_datasets.items()}
        super().__init__(run, tasks, fast_dev_run)

    def encoder(self, pool: ModelPool, state: State) -> Any:
        """The tower with the base model's projection, as an `ImageEncoder`."""
        if pool.base.kind in ENCODERS or any(name.startswith(VISUAL) for name in state):
            return super().encoder(pool, state)
        from tangent_arithmetic.encoders.published.formats import from_huggingface
        from tangent_arithmetic.merging.weights import open_weights

        base = open_weights(self.base_model)
        if huggingface.PROJECTION not in base.outline or base.folder is None:
            raise UsageError(
                f"base_model={self.base_model} has no {huggingface.PROJECTION}, expected the "
                "folder of a whole CLIP (CLIPModel)"
            )
        config = huggingface.read_config(base.folder)
        proj = base.read(huggingface.PROJECTION).T.float()
        found = from_huggingface(base.folder, state, config, None, lambda: {f"{VISUAL}proj": proj})
        encoder = ImageEncoder.without_weights(str(found.info["model"]))
        encoder.load_weights(found.theta)
        return encoder


def generic_task(
    name: str,
    rows: HubRows,
    head: Callable[[Sequence[str], Sequence[Callable[[str], str]]], nn.Module],
) -> Task:
    """A set of the hub that we do not know otherwise: its classes are those of its label column."""
    from tangent_arithmetic.data.hub import HubSet, classes_of, load_rows, pictures_of

    def read() -> tuple[Pictures, tuple[str, ...]]:
        table = load_rows(name, rows.path, rows.config, rows.split)
        classes = classes_of(name, rows.path, table)
        return pictures_of(name, HubSet(rows.path, classes), table), classes

    return Task(
        lambda validation: None if validation else read()[0],
        lambda: head(read()[1], ["a photo of a {}.".format]),
    )
