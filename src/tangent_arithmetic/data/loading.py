"""Loaders whose every random choice is a function of (seed, epoch, index).

Which images a global batch holds is a slice of one seeded permutation; how an image is augmented
depends on (seed, epoch, its index) only. Neither depends on the number of processes, ranks or
workers.
"""

from __future__ import annotations

import errno
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tangent_arithmetic.data.base import Pictures, name_of
from tangent_arithmetic.data.pictures import is_plain, to_rgb
from tangent_arithmetic.runtime.errors import PictureError, RunError, UsageError, shown
from tangent_arithmetic.runtime.processes import prepare_training_worker, prepare_worker

Transform = Callable[[Any], Any]
Key = tuple[int, int]  # epoch, index
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it
NO_SHARED_MEMORY = ("shared memory", "unable to write to file", "unable to resize file", "</torch_")
BUS_ERROR = getattr(signal, "SIGBUS", None)  # what a write to memory that is not there ends with
NO_DESCRIPTORS = ("Too many open files", "ancdata")


@contextmanager
def seeded(entropy: tuple[int, ...]) -> Iterator[None]:
    """Seeds what transforms draw from, and puts its state back on exit.

    Only the CPU generator of PyTorch is seeded: `torch.manual_seed` also queues a call for every
    kind of accelerator, which takes longer than a transform does.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3, np.uint32)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(int(seeds[1]))
    np.random.seed(seeds[2])  # noqa: NPY002 - what others' transforms draw from
    torch.default_generator.manual_seed(int(seeds[0]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class SeededPictures(Dataset[tuple[Any, int]]):
    """Transformed pictures; key (epoch, index) seeds the transform, a plain index means epoch 0.

    Args:
        pictures: the pictures.
        transform: of a picture; None gives it as it is.
        seed: of what the transform draws.
        classes: number of classes, if labels are to be checked.

    Raises:
        PictureError: if a picture cannot be read, or its label is no class; it names the picture.
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

    def __getitem__(self, key: int | Key) -> tuple[Any, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self._read(index)
        if self.transform is None:
            return image, label
        with seeded((self.seed, epoch, index)):
            return self.transform(image), label

    def _read(self, index: int) -> tuple[Any, int]:
        try:
            image, label = self.pictures[index]
            if isinstance(image, Image.Image) and not is_plain(image):
                image = to_rgb(image, name_of(self.pictures, index))
        except (PictureError, MemoryError):
            raise
        except Exception as error:  # whatever a decoder says of a damaged file
            name = name_of(self.pictures, index)
            raise PictureError(
                f"{name} cannot be read ({type(error).__name__}: {error}); it is damaged or no "
                "picture. Fetch it again"
            ) from error
        if self.classes is not None and not 0 <= label < self.classes:
            raise PictureError(
                f"{name_of(self.pictures, index)} has label {label}, expected 0 to "
                f"{self.classes - 1}: the data set has other classes than the head. Check that its "
                "class folders, or its file of labels, are complete"
            )
        return image, label


@dataclass(frozen=True)
class BatchPlan:
    """Which images each micro-step of training holds.

    An epoch is a permutation seeded with (seed, epoch), cut into optimizer steps of
    `batch_size * num_grad_accumulation` images, and each of those into micro-steps of `batch_size`,
    over all ranks. The last step of an epoch may be smaller; no image is seen twice in an epoch.

    Attributes:
        num_samples: images in the data set.
        batch_size: images of a micro-step, over all ranks.
        num_grad_accumulation: micro-steps of an optimizer step.
        seed: of the permutations.
    """

    num_samples: int
    batch_size: int
    num_grad_accumulation: int
    seed: int

    @property
    def step_size(self) -> int:
        """Images of a full optimizer step."""
        return self.batch_size * self.num_grad_accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.num_samples // self.step_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of an epoch."""
        return np.random.default_rng((self.seed, 11, epoch)).permutation(self.num_samples)

    def micro_sizes(self, step: int) -> list[int]:
        """Images of each micro-step of optimizer step `step`, counted from the run's start."""
        start = step % self.steps_per_epoch * self.step_size
        size = min(self.step_size, self.num_samples - start)
        return [min(self.batch_size, size - done) for done in range(0, size, self.batch_size)]

    def micro_batches(self, step: int, order: np.ndarray | None = None) -> list[list[Key]]:
        """The keys of each micro-step of optimizer step `step`, counted from the run's start."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self.permutation(epoch) if order is None else order
        chosen = order[within * self.step_size : (within + 1) * self.step_size].tolist()
        return [
            [(epoch, index) for index in chosen[start : start + self.batch_size]]
            for start in range(0, len(chosen), self.batch_size)
        ]


class RankBatches(Sampler[list[Key]]):
    """The micro-batches of one rank, from optimizer step `start` to `stop`.

    A rank takes every world-size-th image of a micro-batch. Where there is none left for it, it
    gets the first image, which the training loop weights with zero, so that all ranks take part in
    every step.
    """

    def __init__(self, plan: BatchPlan, start: int, stop: int, rank: int, world_size: int) -> None:
        self.plan, self.start, self.stop = plan, start, stop
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0)
        for step in range(self.start, self.stop):
            if step // self.plan.steps_per_epoch != epoch:
                epoch = step // self.plan.steps_per_epoch
                order = self.plan.permutation(epoch)
            for batch in self.plan.micro_batches(step, order):
                yield share(batch, self.rank, self.world_size) or batch[:1]

    def __len__(self) -> int:
        return sum(len(self.plan.micro_sizes(s)) for s in range(self.start, self.stop))


def share(items: Sequence[Any], rank: int, world_size: int) -> list[Any]:
    """Every world-size-th item, from the rank-th on."""
    return list(items[rank::world_size])


class RankSampler(Sampler[int]):
    """Every image once over all ranks, in order; this rank's share."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_samples, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Loader(DataLoader[Any]):
    """A DataLoader whose iterators end their workers with them, and tell why one has died.

    Raises:
        RunError: while iterating, if a worker was killed or cannot hand over what it has loaded.
    """

    def __iter__(self) -> Generator[Any]:  # type: ignore[override]
        batches: Any = None
        try:
            with _undisturbed():
                batches = super().__iter__()
            yield from batches
        except UsageError:
            raise
        except (RuntimeError, OSError, EOFError) as error:
            codes = _exit_codes(getattr(batches, "_workers", []))
            failure = _worker_failure(error, codes, started=batches is not None)
            if self.num_workers and failure is not None:
                raise failure from error
            raise
        finally:  # not when it is collected, which an error's trace puts off
            end = getattr(batches, "_shutdown_workers", None)  # PyTorch has no public name for it
            if end is not None:
                end()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps PyTorch from having SIGCHLD raise an error in the midst of anything when a worker dies.

    The iterator notices it as well, where it waits for a batch, within seconds.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _exit_codes(workers: Sequence[BaseProcess]) -> list[int]:
    """Those other than 0 of the workers that have ended, or do so now."""
    ended = wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(1)
    return [worker.exitcode for worker in workers if worker.exitcode]


def _worker_failure(error: Exception, codes: Sequence[int], started: bool) -> RunError | None:
    """What went wrong with workers, if anything did.

    Args:
        error: from the iterator.
        codes: exit codes of workers other than 0.
        started: whether there were workers already.
    """
    text = str(error)
    killed_by_it = BUS_ERROR is not None and -BUS_ERROR in codes
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if killed_by_it or full or any(part in text for part in NO_SHARED_MEMORY):
        return RunError(
            f"data-loading processes need more shared memory than {_shared_memory()}. Give it more "
            "(docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or load in this "
            "process: --num-workers=0"
        )
    if any(part in text for part in NO_DESCRIPTORS):
        return RunError(
            "too many files are open for the data-loading processes; raise the limit (ulimit -n), "
            "or load in this process: --num-workers=0"
        )
    if text.startswith("Caught "):  # in a worker, which is well
        return None
    if not started:
        return RunError(
            f"data-loading processes cannot be started ({type(error).__name__}: {shown(error)}); "
            "try fewer of them, or none: --num-workers=0"
        )
    if codes or "exited unexpectedly" in text or isinstance(error, OSError | EOFError):
        return RunError(
            f"a data-loading process {_end_of(codes[0] if codes else None)}, and with it the run; "
            "try fewer of them, or none: --num-workers=0"
        )
    return None


def _shared_memory() -> str:
    try:
        facts = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return "this system has"
    return f"{SHARED_MEMORY} has ({facts.free / 2**20:.3g} of {facts.total / 2**20:.3g} MiB free)"


def _end_of(code: int | None) -> str:
    if code is None:
        return "ended"
    if code > 0:
        return f"ended with code {code}"
    memory = ", out of memory perhaps" if code == -signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-code).name}{memory})"


def eval_loader(
    pictures: Pictures,
    transform: Transform | None,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    classes: int | None = None,
) -> Loader:
    """Every image once, in order, split over the ranks.

    Raises:
        UsageError: if there is none.
    """
    if not len(pictures):
        raise UsageError(f"no picture to evaluate on: {type(pictures).__name__} is empty")
    return Loader(
        SeededPictures(pictures, transform, classes=classes),
        batch_size=batch_size,
        sampler=RankSampler(len(pictures), rank, world_size),
        num_workers=num_workers,
        multiprocessing_context=_start_method(num_workers),
        worker_init_fn=prepare_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the global one
    )


@dataclass(frozen=True)
class EvalBatches:
    """A split in the batches of an evaluation: every image once, in order, split over the ranks.

    Iterating gives (images, labels) of this rank, with as many passes as asked for.

    Attributes:
        pictures: the split.
        transform: of a picture; None gives PIL images.
        batch_size: images a batch.
        num_workers: data-loading processes.
        name: of the split, for messages.
        rank: of this process.
        world_size: number of processes.
        num_classes: labels are below this; None for unchecked labels.
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
    def _loader(self) -> Loader:
        return eval_loader(
            self.pictures,
            self.transform,
            self.batch_size,
            self.num_workers,
            self.rank,
            self.world_size,
            self.num_classes,
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def train_loader(
    pictures: Pictures,
    transform: Transform | None,
    batches: RankBatches,
    num_workers: int,
    classes: int | None = None,
) -> Loader:
    """The micro-batches of one rank."""
    return Loader(
        SeededPictures(pictures, transform, batches.plan.seed, classes),
        batch_sampler=batches,
        num_workers=num_workers,
        multiprocessing_context=_start_method(num_workers),
        worker_init_fn=prepare_training_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def iterating(loader: Loader) -> closing[Generator[Any]]:
    """Gives the iterator of a loader, and ends its workers on exit, however that comes."""
    return closing(iter(loader))


def _start_method(num_workers: int) -> str | None:
    """How workers start: on Linux as copies of this process, elsewhere as Python does by default.

    In a process that was spawned itself, as those of `--world-size` are, Python's default is to
    spawn; each worker would then import PyTorch, for seconds, for every data set.
    """
    return "fork" if num_workers and sys.platform == "linux" else None


def to_device(batch: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch, on a device."""
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
