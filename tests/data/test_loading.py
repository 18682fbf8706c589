"""Batches and augmentations depend on (seed, epoch, index) alone; failing workers are explained."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.files import class_pictures
from tangent_arithmetic.data.loading import (
    BatchPlan,
    EvalBatches,
    Key,
    Loader,
    RankBatches,
    SeededPictures,
    to_device,
    train_loader,
)
from tangent_arithmetic.data.waiting import iterating
from tangent_arithmetic.runtime.errors import PictureError, RunError, UsageError

plans = st.builds(
    BatchPlan,
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    num_grad_accumulation=st.integers(1, 4),
    seed=st.integers(0, 5),
)
plans |= plans.map(lambda plan: replace(plan, lengths=np.arange(plan.num_samples) * 7 % 11))
workers = pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",  # Python 3.12 and later
    "ignore:This DataLoader will create:UserWarning",  # on a machine of one core
)


def _pictures(count: int) -> ArrayPictures:
    """Picture i is filled with i and labelled i."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((4, 4, 3), np.uint8)
    return ArrayPictures(images, np.arange(count))


def _draw(image: Image.Image) -> torch.Tensor:
    """A transform that draws from both generators: [picture, torch's number, Python's number]."""
    return torch.tensor([float(np.asarray(image)[0, 0, 0]), torch.rand(()), random.random()])


# --- plans


def test_each_epoch_and_seed_has_a_different_order() -> None:
    orders = [
        tuple(BatchPlan(50, 8, 1, seed).permutation(epoch).tolist())
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len(set(orders)) == 9


@given(plans, st.integers(0, 2))
def test_micro_batches_cover_an_epoch_without_repeats(plan: BatchPlan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    steps = [plan.micro_batches(first + step) for step in range(plan.steps_per_epoch)]
    keys = [key for step in steps for batch in step for key in batch]
    assert keys == [(epoch, index) for index in plan.permutation(epoch).tolist()]
    assert sorted(keys) == [(epoch, index) for index in range(plan.num_samples)]
    full = plan.batch_size * plan.num_grad_accumulation
    assert all(sum(map(len, step)) == full for step in steps[:-1])
    assert 1 <= sum(map(len, steps[-1])) <= full
    for step in steps:
        assert 1 <= len(step) <= plan.num_grad_accumulation
        assert all(len(batch) == plan.batch_size for batch in step[:-1])
        assert 1 <= len(step[-1]) <= plan.batch_size
    sizes = [plan.micro_sizes(first + step) for step in range(plan.steps_per_epoch)]
    assert sizes == [[len(batch) for batch in step] for step in steps]


def test_accumulation_cuts_the_same_steps_into_smaller_pieces() -> None:
    one, four = BatchPlan(53, 12, 1, 7), BatchPlan(53, 3, 4, 7)
    assert one.steps_per_epoch == four.steps_per_epoch == 5
    for step in range(10):
        assert sum(one.micro_batches(step), []) == sum(four.micro_batches(step), [])  # noqa: RUF017


def test_texts_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 1003)
    plain, bucketed = BatchPlan(1003, 8, 2, 3), BatchPlan(1003, 8, 2, 3, lengths)

    def padded(plan: BatchPlan) -> int:  # tokens of an epoch, padding included
        steps = [plan.micro_batches(step) for step in range(plan.steps_per_epoch)]
        batches = [[index for _, index in batch] for step in steps for batch in step]
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    assert padded(bucketed) < 1.15 * lengths.sum() < 1.6 * lengths.sum() < padded(plain)
    for epoch in (0, 1):
        order = bucketed.permutation(epoch)
        assert sorted(order) == list(range(1003))
        means = [lengths[order[start : start + 16]].mean() for start in range(0, 992, 16)]
        assert np.corrcoef(means[1:], means[:-1])[0, 1] < 0.5  # steps are not sorted
        # each bucket has the same texts as without lengths, and so has the last step
        alike = plain.permutation(epoch)
        for start, stop in ((0, 256), (256, 512), (512, 768), (768, 992), (992, 1003)):
            assert sorted(order[start:stop]) == sorted(alike[start:stop])
    assert bucketed.permutation(0).tolist() != bucketed.permutation(1).tolist()


# --- ranks


@given(plans, st.integers(1, 3))
def test_ranks_share_the_global_batches(plan: BatchPlan, world_size: int) -> None:
    stop = 2 * plan.steps_per_epoch
    ranks = [list(RankBatches(plan, 0, stop, rank, world_size)) for rank in range(world_size)]
    expected = [batch for step in range(stop) for batch in plan.micro_batches(step)]
    assert {len(batches) for batches in ranks} == {len(expected)}
    assert len(RankBatches(plan, 0, stop, 0, world_size)) == len(expected)
    for number, batch in enumerate(expected):
        parts = [batches[number] for batches in ranks]
        assert all(parts)  # every rank takes part in every micro-step
        together: list[Key | None] = [None] * len(batch)
        for rank, part in enumerate(parts):
            if rank < len(batch):
                together[rank::world_size] = part
            else:
                assert part == batch[:1]  # the stand-in
        assert together == batch


@given(plans, st.integers(0, 6), st.integers(0, 6))
def test_a_run_can_resume_at_any_step(plan: BatchPlan, start: int, more: int) -> None:
    whole = list(RankBatches(plan, 0, start + more, 0, 2))
    done = list(RankBatches(plan, 0, start, 0, 2))
    assert done + list(RankBatches(plan, start, start + more, 0, 2)) == whole


@given(st.integers(1, 40), st.integers(1, 5))
def test_evaluation_sees_every_image_once(count: int, world_size: int) -> None:
    batches = [
        EvalBatches(_pictures(count), None, 1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [rank.order for rank in batches]
    assert [rank.loader.batch_sampler for rank in batches] == [rank.groups for rank in batches]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert [len(rank) for rank in batches] == [len(share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# --- pictures


def _random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002 - the global generator is what is tested
    return torch.get_rng_state().tolist(), random.getstate(), repr(numpy)


def test_transforms_depend_on_seed_epoch_and_index_only() -> None:
    pictures = SeededPictures(_pictures(6), _draw, seed=3)
    values = {(epoch, index): pictures[epoch, index][0] for index in range(6) for epoch in range(3)}
    torch.manual_seed(99)
    random.seed(99)
    for key in reversed(values):
        image, label = pictures[key]
        assert torch.equal(image, values[key])
        assert label == key[1] == image[0]
    assert torch.equal(pictures[4][0], values[0, 4])  # a plain index means epoch 0
    plain, label = SeededPictures(_pictures(3), None)[1, 2]
    assert isinstance(plain, Image.Image) and plain.getpixel((0, 0)) == (2, 2, 2) and label == 2
    assert len(pictures) == 6
    other = SeededPictures(_pictures(6), _draw, seed=4)
    draws = [*values.values(), *(other[0, index][0] for index in range(6))]
    for place in (1, 2):  # torch's and Python's numbers
        assert max(Counter(round(draw[place].item(), 6) for draw in draws).values()) == 1


def test_global_generators_are_left_alone() -> None:
    before = _random_states()
    SeededPictures(_pictures(3), _draw)[1, 2]
    assert _random_states() == before

    def fail(image: Image.Image) -> None:
        torch.rand(1), random.random()
        raise OSError("cannot read")

    with pytest.raises(OSError, match="cannot read"):
        SeededPictures(_pictures(3), fail)[0]
    list(EvalBatches(_pictures(6), _draw, 2))
    list(train_loader(_pictures(6), _draw, RankBatches(BatchPlan(6, 2, 1, 0), 0, 3, 0, 1), 0))
    assert _random_states() == before


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "an object of type dict"),
        (torch.zeros(1, 3, 4, 4), r"shape \(1, 3, 4, 4\)"),
    ],
)
def test_what_is_no_tensor_of_an_image_is_refused(value: Any, got: str) -> None:
    with pytest.raises(UsageError, match=rf'returns {got} for an image.*\["pixel_values"\]\[0\]'):
        SeededPictures(_pictures(2), lambda image: value)[0]
    array = np.zeros((3, 4, 4))
    assert SeededPictures(_pictures(2), lambda image: array)[0][0] is array


# --- loaders


def _train(num_workers: int) -> list[tuple[Any, Any]]:
    plan = BatchPlan(num_samples=11, batch_size=4, num_grad_accumulation=1, seed=2)
    batches = RankBatches(plan, 0, 2 * plan.steps_per_epoch, 0, 1)
    return [tuple(batch) for batch in train_loader(_pictures(11), _draw, batches, num_workers)]


@workers
def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    torch.manual_seed(1)
    alone = _train(0)
    torch.manual_seed(2)
    workers = _train(2)
    assert len(alone) == len(workers) == 6
    for (images, labels), (others, other_labels) in zip(alone, workers, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
        assert torch.equal(images[:, 0].long(), labels)
    draws = [round(value.item(), 6) for images, _ in alone for value in images[:, 1]]
    assert len(set(draws)) == 22  # an image is augmented anew in the second epoch


@workers
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another start method")
def test_workers_are_forked_even_where_python_would_spawn_them() -> None:
    """A spawned worker imports PyTorch first: seconds a worker, a loader and a data set."""
    for num_workers, method in ((2, "fork"), (0, None)):
        for kind in KINDS:
            context = _loader(kind, _pictures(4), num_workers).multiprocessing_context
            assert (context and context.get_start_method()) == method


@workers
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_keeps_the_order(num_workers: int) -> None:
    batches = EvalBatches(_pictures(7), _draw, 3, num_workers)
    for _ in range(2):
        assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    second = EvalBatches(_pictures(7), _draw, 3, num_workers, rank=1, world_size=2)
    assert [labels.tolist() for _, labels in second] == [[1, 3, 5]]


KINDS = ("training", "evaluation")


def _loader(
    kind: str, pictures: Any, num_workers: int, transform: Any = _draw, classes: int | None = None
) -> Loader:
    if kind == "evaluation":
        return EvalBatches(pictures, transform, 2, num_workers, num_classes=classes).loader
    steps = -(-len(pictures) // 2)
    batches = RankBatches(BatchPlan(len(pictures), 2, 1, 0), 0, steps, 0, 1)
    return train_loader(pictures, transform, batches, num_workers, classes)


@workers
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_and_mislabelled_pictures_are_named(
    kind: str, num_workers: int, tmp_path: Path
) -> None:
    """The message is the same whether the picture is read here or by a worker."""
    for i in range(4):
        path = tmp_path / str(i % 2) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(path)
    damaged = tmp_path / "1" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(PictureError) as got:
        list(_loader(kind, class_pictures(tmp_path), num_workers))
    assert str(got.value).startswith(f"{damaged} cannot be read (")
    assert str(got.value).endswith("it is damaged or not an image. Fetch it again")
    with pytest.raises(PictureError) as got:
        list(_loader(kind, _pictures(4), num_workers, classes=3))
    message = "image 3 of ArrayPictures has label 3, expected 0 to 2: the data set has other"
    assert str(got.value).startswith(message) and "Traceback" not in str(got.value)


class Failing:
    """Pictures of which one raises in a worker, or ends it with an exit code or signal."""

    def __init__(self, fault: int | Exception) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index == 5 and get_worker_info() is not None:
            if isinstance(self.fault, Exception):
                raise self.fault
            if self.fault > 0:
                os._exit(self.fault)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.kill(os.getpid(), -self.fault)
        return np.zeros(3, np.float32), 0


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are checked more often than every five seconds."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@workers
@pytest.mark.usefixtures("soon")
@pytest.mark.skipif(sys.platform != "linux", reason="signals of POSIX")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (-signal.SIGKILL, r"was killed \(SIGKILL, possibly out of memory\), which ended the run"),
        (-signal.SIGSEGV, r"process was killed \(SIGSEGV\), which ended"),
        (-signal.SIGBUS, r"need more shared memory than /dev/shm has \(.* MiB free\)"),
        (3, "process exited with code 3, which ended the run"),
    ],
)
def test_the_death_of_a_worker_is_explained_with_a_way_out(
    kind: str, fault: int, message: str
) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    with (
        pytest.raises(RunError, match=f"{message}.*--num-workers=0$"),
        iterating(_loader(kind, Failing(fault), 1, torch.from_numpy)) as batches,
    ):
        for _ in batches:
            pass
    assert signal.getsignal(signal.SIGCHLD) == handler  # PyTorch's would raise at any point
    assert not multiprocessing.active_children()


@workers
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
            RunError,
            "need more shared memory .* --num-workers=0$",
        ),
        (OSError(24, "Too many open files"), RunError, "too many open files .*=0$"),
        (ZeroDivisionError("a mistake of ours"), ZeroDivisionError, "a mistake of ours"),
        (UsageError("the user's mistake"), UsageError, "the user's mistake"),
    ],
)
def test_errors_of_a_worker_are_told_apart(
    error: Exception, expected: type[Exception], message: str
) -> None:
    """Errors of a transform, which are not those of pictures."""

    def transform(picture: Any) -> Any:
        raise error

    with pytest.raises(expected, match=message):
        list(_loader("evaluation", Failing(ValueError()), 1, transform))


@workers
def test_a_failing_start_of_workers_is_explained_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", refuse)
    with pytest.raises(RunError, match=r"cannot be started \(BlockingIOError: .*--num-workers=0$"):
        list(_loader("evaluation", Failing(1), 2, torch.from_numpy))
    assert len(list(_loader("evaluation", Failing(1), 0, torch.from_numpy))) == 4


SMALL = """
import numpy as np, sys
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.runtime.errors import RunError
from tests.data.test_loading import to_tensor
pictures = ArrayPictures(np.zeros((8, 64, 64, 3), np.uint8), np.zeros(8, np.int64))
try:
    list(EvalBatches(pictures, to_tensor, 4, 2))
except RunError as error:
    print(error)
"""


def to_tensor(picture: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))


@workers
@pytest.mark.slow  # PyTorch is imported anew
@pytest.mark.parametrize("size", ["16k", "64k"])
def test_too_small_shared_memory_is_explained(size: str) -> None:
    """At the start, and at the transfer of the first batch."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.call(
        ["unshare", "-m", "sh", "-c", mount], stderr=subprocess.DEVNULL
    ):
        pytest.skip("needs the right to mount")
    command = ["unshare", "-m", "sh", "-c", f"{mount} && exec '{sys.executable}' -c '{SMALL}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    total = {"16k": "0.0156", "64k": "0.0625"}[size]
    assert "need more shared memory than /dev/shm has (" in done.stdout, done.stderr
    assert f" of {total} MiB free)" in done.stdout and "--num-workers=0" in done.stdout


ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, TypeError, IndexError),
    *(AssertionError, AttributeError, ZeroDivisionError, OverflowError, RuntimeError, zlib.error),
    Image.DecompressionBombError,
)


@pytest.mark.parametrize("error", ERRORS)
def test_a_picture_is_named_whatever_its_decoder_raises(error: type[Exception]) -> None:
    class Damaged:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[Any, int]:
            raise error("x")

    name = error.__name__
    with pytest.raises(PictureError, match=f"image 0 of Damaged cannot be read .{name}: '?x'?."):
        SeededPictures(Damaged(), None)[0]


def test_evaluation_on_no_images_is_an_error() -> None:
    with pytest.raises(UsageError, match="no images to evaluate on: ArrayPictures is empty"):
        iter(EvalBatches(_pictures(0), _draw))


def test_batches_move_to_the_device() -> None:
    images, labels = next(iter(EvalBatches(_pictures(2), _draw)))
    moved = to_device([images, labels], torch.device("meta"))
    assert [value.device.type for value in moved] == ["meta", "meta"]
    assert [value.shape for value in moved] == [(2, 3), (2,)]
