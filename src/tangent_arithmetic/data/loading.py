"""Data loaders in which every random choice is a function of (seed, epoch, index).

The images of a global batch are a slice of a seeded permutation, and the augmentation of an image
depends only on (seed, epoch, its index). Neither depends on the number of ranks or workers.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tangent_arithmetic.data.base import Pictures, name_of
from tangent_arithmetic.data.batched import Parts, parts_of
from tangent_arithmetic.data.pictures import is_plain, to_rgb
from tangent_arithmetic.data.texts import check_reads, collate, lengths_of
from tangent_arithmetic.data.workers import exit_codes, without_sigchld_handler, worker_failure
from tangent_arithmetic.runtime.errors import PictureError, UsageError
from tangent_arithmetic.runtime.processes import prepare_training_worker, prepare_worker

Transform = Callable[[Any], Any]
Key = tuple[int, int]  # epoch, index
BUCKET = 16  # steps of texts that are sorted by length together
TOKENS = 2048  # of a batch of texts that are evaluated, padding included


def seed_transforms(entropy: tuple[int, ...]) -> None:
    """Seeds the generators that transforms draw from.

    Seeds only PyTorch's CPU generator: `torch.manual_seed` also queues a call for every type of
    accelerator, which takes longer than a transform.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3, np.uint32)
    random.seed(int(seeds[1]))
    np.random.seed(seeds[2])  # noqa: NPY002 - third-party transforms draw from it
    torch.default_generator.manual_seed(int(seeds[0]))


@contextmanager
def restored() -> Iterator[None]:
    """Restores the states of these generators on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _index(key: int | Key) -> int:
    return key[1] if isinstance(key, tuple) else key


class SeededPictures(Dataset[tuple[Any, Any]]):
    """Transformed images; key (epoch, index) seeds the transform, a plain index means epoch 0.

    Args:
        pictures: the images.
        transform: applied to each image; None for no transform.
        seed: of the transform's random choices.
        classes: number of classes; None to leave labels unchecked. Several labels an image are an
            array of zeros and ones, one per class.

    Raises:
        PictureError: if an image cannot be read or its label is invalid; it names the image.
    """

    def __init__(
        self,
        pictures: Pictures,
        transform: Transform | None,
        seed: int = 0,
        classes: int | None = None,
    ) -> None:
        self.pictures, self.transform, self.seed, self.classes = pictures, transform, seed, classes

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def parts(self) -> Parts | None:
        """The transform in a part for each image and one for several; None if it has none."""
        return parts_of(self.transform)

    def __getitem__(self, key: int | Key) -> tuple[Any, Any]:
        if self.transform is None:
            return self._read(_index(key))
        image, label = self._read(_index(key))
        with restored():
            self._seed(key)
            return _checked(self.transform(image), image), label

    def __getitems__(self, keys: Sequence[int | Key]) -> list[tuple[Any, Any]]:
        """The images and labels of a batch, as one after the other."""
        if self.parts is None:
            return [self[key] for key in keys]
        images, labels = [], []
        with restored() if self.parts.draws else nullcontext():
            for key in keys:
                image, label = self._read(_index(key))
                if self.parts.draws:
                    self._seed(key)
                images.append(self.parts.head(image))
                labels.append(label)
        return list(zip(self.parts.together(images), labels, strict=True))

    def _seed(self, key: int | Key) -> None:
        seed_transforms((self.seed, *(key if isinstance(key, tuple) else (0, key))))

    def _read(self, index: int) -> tuple[Any, Any]:
        try:
            image, label = self.pictures[index]
            if isinstance(image, Image.Image) and not is_plain(image):
                image = to_rgb(image, name_of(self.pictures, index))
            check_reads(self.transform, image, partial(name_of, self.pictures, index))
        except (PictureError, MemoryError):
            raise
        except Exception as error:  # decoders raise almost anything for a damaged file
            name = name_of(self.pictures, index)
            raise PictureError(
                f"{name} cannot be read ({type(error).__name__}: {error}); it is damaged or not an "
                "image. Fetch it again"
            ) from error
        if self.classes is not None:
            self._check(label, index, self.classes)
        return image, label

    def _check(self, label: Any, index: int, classes: int) -> None:
        """Raises a `PictureError` if a label is not one of a head's classes."""
        if np.ndim(label) == 0 and 0 <= label < classes:
            return
        if np.ndim(label) == 1 and len(label) == classes:  # several labels, zeros and ones
            return
        got = f"label {label}" if np.ndim(label) == 0 else f"labels of shape {np.shape(label)}"
        expected = f"0 to {classes - 1}" if np.ndim(label) == 0 else f"shape ({classes},)"
        raise PictureError(
            f"{name_of(self.pictures, index)} has {got}, expected {expected}: the data set has "
            "other classes than the head. Check that its class folders or its label file are "
            "complete"
        )


def _checked(value: Any, image: object) -> Any:
    """Returns a transformed example, if it can be part of a batch.

    Raises:
        UsageError: if a model's transform returns anything but a tensor of one image.
    """
    if not isinstance(image, Image.Image):
        return value
    fits = isinstance(value, Tensor | np.ndarray)
    if fits and value.ndim <= 3:
        return value
    got = f"shape {tuple(value.shape)}" if fits else f"an object of type {type(value).__name__}"
    raise UsageError(
        f"the model's preprocessing returns {got} for an image, expected a tensor (channels, "
        'height, width); of an image processor of transformers return ["pixel_values"][0]'
    )


@dataclass(frozen=True)
class BatchPlan:
    """Assigns images to the micro-steps of training.

    An epoch is a permutation seeded with (seed, epoch), cut into optimizer steps of
    `batch_size * num_grad_accumulation` images, and each of those into micro-steps of `batch_size`,
    over all ranks. The last step of an epoch may be smaller; no image is seen twice in an epoch.

    Texts of like length share a step, so that little of a batch is padding: of each `BUCKET` steps'
    texts, drawn at random, the shortest make one step, the next another, and the steps are
    shuffled.

    Attributes:
        num_samples: number of images.
        batch_size: images per micro-step, over all ranks.
        num_grad_accumulation: micro-steps per optimizer step.
        seed: of the permutations.
        lengths: of each text; None for images, which have one size.
    """

    num_samples: int
    batch_size: int
    num_grad_accumulation: int
    seed: int
    lengths: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        pictures: Pictures,
        transform: Transform | None,
        batch_size: int,
        num_grad_accumulation: int = 1,
        seed: int = 0,
    ) -> BatchPlan:
        """The plan of a split for a model with this transform."""
        lengths = lengths_of(pictures, transform)
        return cls(len(pictures), batch_size, num_grad_accumulation, seed, lengths)

    @property
    def step_size(self) -> int:
        """Images per full optimizer step."""
        return self.batch_size * self.num_grad_accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-self.num_samples // self.step_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of an epoch."""
        generator = np.random.default_rng((self.seed, 11, epoch))
        order = generator.permutation(self.num_samples)
        if self.lengths is None:
            return order
        whole = self.num_samples - self.num_samples % self.step_size  # the rest stays last
        for start in range(0, whole, BUCKET * self.step_size):
            bucket = order[start : min(start + BUCKET * self.step_size, whole)]
            by_length = bucket[np.argsort(self.lengths[bucket], kind="stable")]
            bucket[:] = generator.permutation(by_length.reshape(-1, self.step_size)).ravel()
        return order

    def micro_sizes(self, step: int) -> list[int]:
        """Sizes of the micro-steps of optimizer step `step`, counted from the start of the run."""
        start = step % self.steps_per_epoch * self.step_size
        size = min(self.step_size, self.num_samples - start)
        return [min(self.batch_size, size - done) for done in range(0, size, self.batch_size)]

    def micro_batches(self, step: int, order: np.ndarray | None = None) -> list[list[Key]]:
        """The keys of the micro-steps of optimizer step `step`, counted from the start of the run.

        Args:
            step: the optimizer step.
            order: `permutation` of its epoch, to avoid computing it again.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self.permutation(epoch) if order is None else order
        indices = order[within * self.step_size : (within + 1) * self.step_size].tolist()
        return [
            [(epoch, index) for index in indices[start : start + self.batch_size]]
            for start in range(0, len(indices), self.batch_size)
        ]


class Batches(Sampler[list[Key]]):
    """The keys of each batch of a loader.

    Attributes:
        seed: of the augmentation.
    """

    seed: int


class RankBatches(Batches):
    """The micro-batches of one rank, from optimizer step `start` to `stop`.

    A rank takes every world-size-th image of a micro-batch. A rank left without images gets the
    first one, which the training loop gives weight zero, so that all ranks take part in every step.
    """

    def __init__(self, plan: BatchPlan, start: int, stop: int, rank: int, world_size: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop
        self.rank, self.world_size, self.seed = rank, world_size, plan.seed

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0)
        for step in range(self.start, self.stop):
            if step // self.plan.steps_per_epoch != epoch:
                epoch = step // self.plan.steps_per_epoch
                order = self.plan.permutation(epoch)
            for batch in self.plan.micro_batches(step, order):
                yield batch[self.rank :: self.world_size] or batch[:1]

    def __len__(self) -> int:
        return sum(len(self.plan.micro_sizes(s)) for s in range(self.start, self.stop))


class Loader(DataLoader[Any]):
    """A DataLoader whose workers stop with the iterator, and which explains why a worker died.

    Raises:
        RunError: during iteration, if a worker was killed or cannot transfer a batch.
    """

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        batches: Any = None
        try:
            with without_sigchld_handler():
                batches = super().__iter__()
            yield from batches
        except UsageError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            codes = exit_codes(getattr(batches, "_workers", []))
            failure = worker_failure(error, codes, started=batches is not None)
            if self.num_workers and failure is not None:
                raise failure from error
            raise
        finally:  # not on garbage collection, which an error's traceback delays
            shut_down = getattr(batches, "_shutdown_workers", None)  # PyTorch has no public name
            if shut_down is not None:
                shut_down()


@dataclass(frozen=True)
class EvalBatches:
    """The evaluation batches of a split: every image once, split over the ranks.

    They are in the order of `order`: that of the split, or by length for texts, so that few tokens
    of a batch are padding, as also a batch has at most `TOKENS` of them. Iterating yields this
    rank's (images, labels), any number of times.

    Attributes:
        pictures: the split.
        transform: applied to each image; None yields PIL images.
        batch_size: images per batch; of texts, at most.
        num_workers: data-loading processes.
        name: of the split, for messages.
        rank: of this process.
        world_size: number of processes.
        num_classes: labels must be smaller; None to leave labels unchecked.

    Raises:
        UsageError: on first use, if there are no images.
    """

    pictures: Pictures
    transform: Transform | None
    batch_size: int = 256
    num_workers: int = 0
    name: str = "a split"
    rank: int = 0
    world_size: int = 1
    num_classes: int | None = None

    @cached_property
    def groups(self) -> list[list[int]]:
        """The indices of this rank's examples by batch."""
        lengths = lengths_of(self.pictures, self.transform)
        if lengths is None:
            whole = list(range(len(self.pictures)))[self.rank :: self.world_size]
            size = self.batch_size
            return [whole[start : start + size] for start in range(0, len(whole), size)]
        groups: list[list[int]] = []
        for index in np.argsort(lengths, kind="stable")[self.rank :: self.world_size].tolist():
            count = 1 + len(groups[-1]) if groups else 1
            if count == 1 or count > self.batch_size or count * lengths[index] > TOKENS:
                groups.append([])
            groups[-1].append(index)
        return groups

    @property
    def order(self) -> list[int]:
        """The indices of this rank's examples, in the order of its batches."""
        return [index for group in self.groups for index in group]

    @cached_property
    def loader(self) -> Loader:
        """The data loader behind the batches."""
        if not len(self.pictures):
            raise UsageError(f"no images to evaluate on: {type(self.pictures).__name__} is empty")
        return Loader(
            SeededPictures(self.pictures, self.transform, classes=self.num_classes),
            batch_sampler=self.groups,
            collate_fn=collate,
            num_workers=self.num_workers,
            multiprocessing_context=_start_method(self.num_workers),
            worker_init_fn=prepare_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise the loader draws from the global one
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def train_loader(
    pictures: Pictures,
    transform: Transform | None,
    batches: Batches,
    num_workers: int,
    classes: int | None = None,
) -> Loader:
    """The micro-batches of one rank."""
    return Loader(
        SeededPictures(pictures, transform, batches.seed, classes),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        multiprocessing_context=_start_method(num_workers),
        worker_init_fn=prepare_training_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def _start_method(num_workers: int) -> str | None:
    """Fork on Linux, also in spawned processes; elsewhere Python's default.

    A spawned worker would spend seconds importing PyTorch for every data set.
    """
    return "fork" if num_workers and sys.platform == "linux" else None


def to_device(batch: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch, moved to a device."""
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
