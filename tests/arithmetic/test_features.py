"""Features of linear models: exact at every coefficient, computed once, found again."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL.ImageOps import grayscale
from safetensors.torch import load, save_file
from torch import Tensor
from torchvision.transforms import Compose, Normalize

from src.heads import get_classification_head
from tangent_arithmetic.arithmetic import features
from tangent_arithmetic.arithmetic.features import Features
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.data.registry import ImageDataset, SuiteData
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import split_of
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp, software
from tangent_arithmetic.runtime.atomic import atomic
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.storage.statedict import move, scale
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.miniatures import Opaque
from tests.small_suite import SIZES, random_vector, small_config, small_suite

ROOT = Path(__file__).resolve().parents[2]
Patch = pytest.MonkeyPatch
State = dict[str, Tensor]
COEF = st.floats(-2, 2, allow_subnormal=False)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder(Config())


@pytest.fixture
def linear(encoder: ImageEncoder) -> LinearizedImageEncoder:
    return LinearizedImageEncoder(image_encoder=encoder)


@pytest.fixture
def args(tmp_path: Path, monkeypatch: Patch) -> Iterator[Config]:
    """24 pictures in three batches, the last smaller; nothing is kept yet."""
    for split in ("test", "val"):
        monkeypatch.setitem(SIZES, split, 24)
    with small_suite(monkeypatch):
        config = small_config(tmp_path)
        config.batch_size = 10
        yield config


@pytest.fixture
def passes(monkeypatch: Patch) -> list[int]:
    """The number of directions of each pass through a linear model."""
    seen: list[int] = []
    tangents = LinearizedModel.tangents

    def counted(self: LinearizedModel, x: Any, vectors: Any, **kwargs: Any) -> Any:
        seen.append(len(vectors))
        return tangents(self, x, vectors, **kwargs)

    monkeypatch.setattr(LinearizedModel, "tangents", counted)
    return seen


def linear_features(
    linear: LinearizedImageEncoder, vectors: Sequence[State], name: str, args: Config
) -> Features:
    """The features of a split of the run, kept where the run keeps them."""
    run = Run.of(args)
    batches = run.data.batches(name, linear.val_preprocess)
    return features.linear_features(linear, vectors, batches, run.compute, run.feature_cache)


def folder_of(linear: LinearizedImageEncoder, pictures: Any, args: Config) -> Path | None:
    """The folder of the features of these pictures."""
    run = Run.of(args)
    rank, size = ddp.rank(), ddp.world_size()
    batches = EvalBatches(pictures, linear.val_preprocess, rank=rank, world_size=size)
    return features._folder(run.cache / "features", linear, batches, run.compute)


def vectors_of(linear: LinearizedImageEncoder, count: int) -> list[State]:
    return [random_vector(linear.weights0(), seed=seed) for seed in range(count)]


def kept(args: Config) -> set[Path]:
    """The files of features."""
    return set((Path(str(args.cache_dir)) / "features").rglob("*.safetensors"))


def identical(a: Features, b: Features) -> bool:
    """Whether two features have the same bits."""
    pairs = zip((a.f0, a.labels, *a.directions), (b.f0, b.labels, *b.directions), strict=True)
    return all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def pictures_of(linear: LinearizedImageEncoder, data: ImageDataset) -> tuple[Tensor, Tensor]:
    """All images of a split in one batch, and their labels."""
    pairs = [data.test[i] for i in range(len(data.test))]
    transform = linear.val_preprocess
    assert transform is not None
    images = torch.stack([transform(image) for image, _ in pairs])
    return images, torch.tensor([label for _, label in pairs])


def declared(recipe: Any, *steps: Any) -> Compose:
    """A transform that says what it does."""
    transform = Compose(steps)
    transform.recipe = recipe
    return transform


def fresh(linear: LinearizedImageEncoder, vectors: list[State], args: Config) -> Features:
    """The features of the test split, neither kept nor found."""
    return linear_features(linear, vectors, "Emoji", replace(args, feature_cache=False))


# what they are


@pytest.mark.parametrize("name", ["Emoji", "EmojiVal"])
def test_they_are_those_of_the_model_on_the_whole_split_in_order(
    args: Config, linear: LinearizedImageEncoder, name: str
) -> None:
    vectors = vectors_of(linear, 2)
    found = linear_features(linear, vectors, name, args)
    images, labels = pictures_of(linear, Run.of(args).data.dataset(name))
    with torch.no_grad():
        f0, steps = linear.model.tangents(images, vectors)
    assert torch.equal(found.labels, labels) and found.labels.dtype == torch.int64
    assert len(found.directions) == 2
    for mine, expected in zip((found.f0, *found.directions), (f0, *steps), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == expected.shape
        assert distance(mine, expected) < 1e-5


@pytest.mark.parametrize("coefs", [(0.0, 0.0), (1.0, 0.0), (0.3, -0.7), (1.0, 1.0)])
def test_the_logits_at_any_coefficients_are_those_of_the_encoder_moved_there(
    args: Config, linear: LinearizedImageEncoder, coefs: tuple[float, float]
) -> None:
    vectors = vectors_of(linear, 2)
    found = linear_features(linear, vectors, "Emoji", args)
    head = get_classification_head(args, "Emoji")
    theta = linear.weights0()
    for coef, tau in zip(coefs, vectors, strict=True):
        theta = move(theta, tau, coef)
    linear.load_weights(theta)
    images, _ = pictures_of(linear, Run.of(args).data.dataset("Emoji"))
    with torch.no_grad():
        assert distance(head(found.at(coefs)), head(linear(images))) < 1e-5


def test_the_encoders_own_theta_takes_no_part(args: Config, linear: LinearizedImageEncoder) -> None:
    (tau,) = vectors_of(linear, 1)
    before = fresh(linear, [tau], args)
    linear.load_weights(move(linear.weights(), tau, 0.5))
    assert identical(fresh(linear, [tau], args), before)


@given(st.lists(st.tuples(COEF, COEF), min_size=2, max_size=2), COEF)
def test_they_are_affine_in_the_coefficients(points: list[tuple[float, float]], t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    f0, one, other = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    found = Features(f0, [one, other], torch.zeros(5, dtype=torch.int64))
    (a, b), (c, d) = points
    assert torch.equal(found.at((0.0, 0.0)), f0)
    torch.testing.assert_close(found.at((a, b)), f0 + a * one + b * other)
    between = (a + t * (c - a), b + t * (d - b))
    torch.testing.assert_close(
        found.at(between), (1 - t) * found.at((a, b)) + t * found.at((c, d)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("coefs", [(), (1.0, 2.0)])
def test_each_direction_needs_its_coefficient(coefs: tuple[float, ...]) -> None:
    found = Features(torch.ones(2, 3), [torch.ones(2, 3)], torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        found.at(coefs)


def test_to_another_device_goes_everything() -> None:
    found = Features(torch.ones(2, 3), [torch.ones(2, 3)], torch.zeros(2, dtype=torch.int64))
    moved = found.to(torch.device("meta"))
    assert {v.device.type for v in (moved.f0, moved.labels, *moved.directions)} == {"meta"}


def test_the_shares_of_the_ranks_make_the_whole(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    vectors = vectors_of(linear, 1)
    whole = linear_features(linear, vectors, "Emoji", args)
    monkeypatch.setattr(ddp, "world_size", lambda: 5)
    for rank in range(5):
        monkeypatch.setattr(ddp, "rank", lambda rank=rank: rank)
        share = linear_features(linear, vectors, "Emoji", args)
        assert torch.equal(share.labels, whole.labels[rank::5])
        assert distance(share.f0, whole.f0[rank::5]) < 1e-5
        assert distance(share.directions[0], whole.directions[0][rank::5]) < 1e-5


def test_a_rank_without_pictures_has_no_features(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch, passes: list[int]
) -> None:
    vectors = vectors_of(linear, 2)
    monkeypatch.setattr(ddp, "world_size", lambda: 60)
    monkeypatch.setattr(ddp, "rank", lambda: 50)
    for _ in ("computed", "found"):
        share = linear_features(linear, vectors, "Emoji", args)
        assert len(share.labels) == len(share.f0) == 0 and share.labels.dtype == torch.int64
        assert [len(direction) for direction in share.directions] == [0, 0]
    assert passes == []


@pytest.fixture
def batchnorm(args: Config, resnet: str) -> LinearizedImageEncoder:
    args.model, args.suite = resnet, "embedded"
    encoder = LinearizedImageEncoder(image_encoder=ImageEncoder(args))
    assert encoder.model.module_buffers()
    return encoder


def test_buffers_in_a_task_vector_are_passed_over(
    args: Config, batchnorm: LinearizedImageEncoder, passes: list[int]
) -> None:
    tau = random_vector(batchnorm.weights0())
    params = {name: tau[name] for name in batchnorm.model.theta0()}
    assert len(params) < len(tau)
    found = linear_features(batchnorm, [tau], "Emoji", args)
    passes.clear()
    assert identical(linear_features(batchnorm, [params], "Emoji", args), found)
    assert passes == [] and len(kept(args)) == 2


def test_buffers_of_the_encoder_count(
    args: Config, batchnorm: LinearizedImageEncoder, passes: list[int]
) -> None:
    (tau,) = vectors_of(batchnorm, 1)
    before = linear_features(batchnorm, [tau], "Emoji", args)
    passes.clear()
    name = next(n for n in batchnorm.model.module_buffers() if n.endswith("running_mean"))
    batchnorm.model.module_buffers()[name].add_(1.0)
    after = linear_features(batchnorm, [tau], "Emoji", args)
    assert passes and not torch.equal(after.f0, before.f0)


def test_bf16_gives_float32_features_near_those_of_float32(
    args: Config, linear: LinearizedImageEncoder
) -> None:
    vectors = vectors_of(linear, 1)
    wide = fresh(linear, vectors, args)
    args.precision = "bf16"
    narrow = fresh(linear, vectors, args)
    pairs = zip((narrow.f0, *narrow.directions), (wide.f0, *wide.directions), strict=True)
    for mine, expected in pairs:
        assert mine.dtype == torch.float32
        assert 1e-5 < distance(mine, expected) < 0.05


# what is kept


def test_what_is_kept_is_read_and_nothing_is_computed(
    args: Config,
    linear: LinearizedImageEncoder,
    passes: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    vectors = vectors_of(linear, 2)
    first = linear_features(linear, vectors, "Emoji", args)
    assert passes == [2, 2, 2] and len(kept(args)) == 3
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # a file to be made
    passes.clear()
    again = linear_features(linear, vectors, "Emoji", args)
    assert passes == []
    assert identical(again, first) and identical(again, fresh(linear, vectors, args))


def test_a_second_vector_is_the_only_one_computed(
    args: Config, linear: LinearizedImageEncoder, passes: list[int]
) -> None:
    one, other, third = vectors_of(linear, 3)
    alone = linear_features(linear, [one], "Emoji", args)
    assert passes == [1, 1, 1]
    passes.clear()
    both = linear_features(linear, [other, one], "Emoji", args)
    assert passes == [1, 1, 1]
    assert torch.equal(both.directions[1], alone.directions[0])
    passes.clear()
    found = linear_features(linear, [one, other, third], "Emoji", args)
    assert passes == [1, 1, 1]
    expected = fresh(linear, [one, other, third], args)
    for mine, true in zip(found.directions, expected.directions, strict=True):
        assert distance(mine, true) < 1e-5


def test_a_vector_and_its_opposite_share_a_file(
    args: Config, linear: LinearizedImageEncoder, passes: list[int]
) -> None:
    (tau,) = vectors_of(linear, 1)
    for first, second in ((tau, scale(tau, -1.0)), (scale(tau, -1.0), tau)):
        one = linear_features(linear, [first], "Emoji", args)
        passes.clear()
        other = linear_features(linear, [second], "Emoji", args)
        assert passes == [] and len(kept(args)) == 2
        assert torch.equal(other.directions[0], -one.directions[0])
        assert distance(one.directions[0], fresh(linear, [first], args).directions[0]) < 1e-6
    both = linear_features(linear, [scale(tau, -1.0), tau], "Emoji", args)
    assert torch.equal(both.directions[0], -both.directions[1])


def test_leading_zeros_do_not_hide_the_sign(args: Config, linear: LinearizedImageEncoder) -> None:
    (tau,) = vectors_of(linear, 1)
    names = sorted(tau)
    sparse = {name: torch.zeros_like(tau[name]) for name in names[:2]}
    sparse |= {name: tau[name] for name in names[2:]}
    sparse[names[2]].view(-1)[:3] = 0.0
    linear_features(linear, [sparse], "Emoji", args)
    linear_features(linear, [scale(sparse, -1.0)], "Emoji", args)
    assert len(kept(args)) == 2


def test_a_zero_vector_has_a_zero_direction(args: Config, linear: LinearizedImageEncoder) -> None:
    (tau,) = vectors_of(linear, 1)
    for vector in ({}, scale(tau, 0.0)):
        for _ in ("computed", "found"):
            found = linear_features(linear, [vector], "Emoji", args)
            assert found.directions[0].shape == found.f0.shape
            assert not found.directions[0].any() and found.f0.any()


def test_without_the_cache_nothing_is_written_or_read(
    args: Config, linear: LinearizedImageEncoder, passes: list[int]
) -> None:
    vectors = vectors_of(linear, 1)
    args.feature_cache = False
    first = linear_features(linear, vectors, "Emoji", args)
    assert not kept(args)
    args.feature_cache = True
    linear_features(linear, vectors, "Emoji", args)
    for path in kept(args):
        path.write_bytes(b"nobody reads this")
    args.feature_cache = False
    passes.clear()
    assert identical(linear_features(linear, vectors, "Emoji", args), first)
    assert passes == [1, 1, 1]


# what they are kept under


@dataclass
class Case:
    """What features are asked for with."""

    args: Config
    linear: LinearizedImageEncoder
    tau: State
    patch: Patch

    def show(self, pictures: Any) -> None:
        """Puts other pictures in the place of the test split."""

        def other(data: SuiteData, name: str) -> ImageDataset:
            return replace(data.dataset(name), test=pictures)

        self.patch.setattr(SuiteData, "evaluated", other)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the test split's images and labels."""
        test = Run.of(self.args).data.dataset("Emoji").test
        assert isinstance(test, ArrayPictures)
        return test.images.copy(), test.labels.copy()


def another_theta0(case: Case) -> None:
    list(case.linear.model.theta0().values())[-1].view(-1)[-1].add_(1e-2)


def another_tau(case: Case) -> None:
    name = max(case.tau)
    case.tau = {**case.tau, name: case.tau[name].clone()}
    case.tau[name].view(-1)[-1].add_(1e-2)


def another_picture(case: Case) -> None:
    images, labels = case.arrays()
    images[-1, -1, -1, -1] ^= 128
    case.show(ArrayPictures(images, labels))


def another_label(case: Case) -> None:
    images, labels = case.arrays()
    labels[-1] += 1
    case.show(ArrayPictures(images, labels))


def another_order(case: Case) -> None:
    images, labels = case.arrays()
    case.show(ArrayPictures(images[::-1].copy(), labels[::-1].copy()))


def another_preprocessing(case: Case) -> None:
    after = Normalize((0.5,) * 3, (1.0,) * 3)
    case.linear.val_preprocess = declared("other", case.linear.val_preprocess, after)


def another_step_under_the_same_recipe(case: Case) -> None:
    own: Any = case.linear.val_preprocess
    after = Normalize((0.5,) * 3, (1.0,) * 3)
    case.linear.val_preprocess = declared(own.recipe, *own.transforms, after)


def another_precision(case: Case) -> None:
    case.args.precision = "bf16"


def another_source(case: Case) -> None:
    case.patch.setattr(software, "sources_hash", lambda _: "0" * 64)


def another_pytorch(case: Case) -> None:
    others = {**software.libraries(), "torch": "0.0"}
    case.patch.setattr(software, "libraries", lambda: others)


def another_world_size(case: Case) -> None:
    case.patch.setattr(ddp, "world_size", lambda: 2)


CHANGES: list[Callable[[Case], None]] = [
    another_theta0,
    another_tau,
    another_picture,
    another_label,
    another_order,
    another_preprocessing,
    another_step_under_the_same_recipe,
    another_precision,
    another_source,
    another_pytorch,
    another_world_size,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_they_depend_on_is_in_the_key(
    args: Config,
    linear: LinearizedImageEncoder,
    monkeypatch: Patch,
    passes: list[int],
    change: Callable[[Case], None],
) -> None:
    case = Case(args, linear, vectors_of(linear, 1)[0], monkeypatch)
    linear_features(linear, [case.tau], "Emoji", args)
    before = kept(args)
    change(case)
    passes.clear()
    after = linear_features(linear, [case.tau], "Emoji", args)
    assert passes
    assert kept(args) > before  # the old ones are still those of the old key
    assert identical(after, fresh(linear, [case.tau], args))


def test_rank_and_model_and_device_are_in_the_key(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    pictures = Run.of(args).data.dataset("Emoji").test

    def key() -> str:
        return str(folder_of(linear, pictures, args))

    keys = [key()]
    with monkeypatch.context() as patch:
        patch.setattr(ddp, "world_size", lambda: 2)
        for rank in (0, 1):
            patch.setattr(ddp, "rank", lambda rank=rank: rank)
            keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(LinearizedImageEncoder, "identity", lambda _: "another")
        keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(Run, "compute", Compute(torch.device("cuda", 1)))
        keys.append(key())
    assert len(set(keys)) == 5
    assert key() == keys[0]


def test_what_they_do_not_depend_on_is_not_in_the_key(
    args: Config, linear: LinearizedImageEncoder, passes: list[int], tmp_path: Path
) -> None:
    (tau,) = vectors_of(linear, 1)
    first = linear_features(linear, [tau], "Emoji", args)
    passes.clear()
    linear.load_weights(move(linear.weights(), tau, 0.5))
    linear.train()
    args.batch_size, args.num_workers, args.seed = 7, 1, 5
    args.save = args.results = str(tmp_path / "elsewhere")
    reordered = {name: tau[name] for name in reversed(tau)}
    assert identical(linear_features(linear, [reordered], "Emoji", args), first)
    assert passes == []


KEYS = """
import sys
import numpy as np
from PIL.ImageOps import grayscale
from torchvision.transforms import Compose
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.run.args import Config
from tests.arithmetic.test_features import folder_of
linear = LinearizedImageEncoder(image_encoder=ImageEncoder(Config()))
args = Config(device="cpu", cache_dir=sys.argv[1])
pictures = ArrayPictures(np.zeros((2, 4, 4, 3), dtype=np.uint8), np.arange(2))
print(folder_of(linear, pictures, args))
linear.val_preprocess = Compose([grayscale, linear.val_preprocess])
linear.val_preprocess.recipe = "grey"
print(folder_of(linear, pictures, args))
"""
PICTURES = ArrayPictures(np.zeros((2, 4, 4, 3), dtype=np.uint8), np.arange(2))


@pytest.fixture(scope="module")
def keys_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The keys as another process makes them: with the model's transform, and with a function."""
    folder = tmp_path_factory.mktemp("cache")
    done = subprocess.run(
        [sys.executable, "-c", KEYS, str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [Path(line).name for line in done.stdout.split()]


def test_another_process_finds_them(
    args: Config, linear: LinearizedImageEncoder, keys_elsewhere: list[str]
) -> None:
    folder = folder_of(linear, PICTURES, args)
    assert folder is not None and folder.name == keys_elsewhere[0]


def test_another_process_finds_those_of_a_declared_recipe(
    args: Config, linear: LinearizedImageEncoder, keys_elsewhere: list[str]
) -> None:
    # the address of a function in repr(transform) is no part of the key
    linear.val_preprocess = declared("grey", grayscale, linear.val_preprocess)
    folder = folder_of(linear, PICTURES, args)
    assert folder is not None and folder.name == keys_elsewhere[1]


class Shift:
    """A transform that does not say what it does."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, images: Tensor) -> Tensor:
        return images + self.by

    def __repr__(self) -> str:
        return "Shift()"


def shift(by: float) -> Callable[[Tensor], Tensor]:
    return lambda images: images + by


@pytest.mark.parametrize("make", [Shift, shift])
def test_transforms_that_declare_no_recipe_are_not_taken_for_one_another(
    args: Config,
    linear: LinearizedImageEncoder,
    make: Callable[[float], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tau,) = vectors_of(linear, 1)
    own, found = linear.val_preprocess, []
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        for by in (0.0, 1.0):
            linear.val_preprocess = Compose([own, make(by)])
            found.append(linear_features(linear, [tau], "Emoji", args))
            assert identical(found[-1], fresh(linear, [tau], args))
    assert not identical(*found)
    assert not kept(args) and "preprocessing declares no recipe" in caplog.text


def test_features_that_cannot_be_kept_are_no_error(
    args: Config, linear: LinearizedImageEncoder, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tau,) = vectors_of(linear, 1)
    blocked = tmp_path / "file"
    blocked.write_text("in the place of the folder")
    own = folder_of(linear, PICTURES, args)
    assert own is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_folder", lambda *_: blocked / own.name)
        found = linear_features(linear, [tau], "Emoji", args)
    assert identical(found, fresh(linear, [tau], args))
    assert "features are not kept" in caplog.text


def test_features_of_pictures_without_identity_are_not_kept(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch, passes: list[int]
) -> None:
    case = Case(args, linear, vectors_of(linear, 1)[0], monkeypatch)
    case.show(Opaque(ArrayPictures(*case.arrays())))
    for _ in range(2):
        passes.clear()
        found = linear_features(linear, [case.tau], "Emoji", args)
        assert passes == [1, 1, 1] and not kept(args)
    assert identical(found, fresh(linear, [case.tau], args))


# damage and size


def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:-1] for name, value in tensors.items()}


def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "features": tensors["features"][:, :-1].contiguous()}


def without_features(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"other": tensors["features"]}


def mislabelled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "labels": tensors["labels"] + 1}


def flip(content: bytes, at: int) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 1
    return bytes(damaged)


def written_again(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    """A file of other tensors with a checksum that is right."""

    def damage(path: Path) -> None:
        features._write(path, change(features._read(path)))

    return damage


def overwritten(change: Callable[[bytes], bytes]) -> Any:
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": overwritten(lambda content: b""),
    "garbage": overwritten(lambda content: b"no tensors" * 9),
    "cut short": overwritten(lambda content: content[:-99]),
    "a bit of the numbers": overwritten(lambda content: flip(content, len(content) - 5)),
    "a bit further on": overwritten(lambda content: flip(content, len(content) - 4000)),
    "without a checksum": lambda path: save_file(features._read(path), path),
    "fewer pictures": written_again(cut),
    "a missing key": written_again(without_features),
}
DAMAGED_F0 = {"other labels": written_again(mislabelled)}
DAMAGED_DIRECTION = {"narrower": written_again(narrower)}


@pytest.mark.parametrize(
    "victim, damage",
    [(v, d) for v in ("f0", "direction") for d in DAMAGES.values()]
    + [("f0", d) for d in DAMAGED_F0.values()]
    + [("direction", d) for d in DAMAGED_DIRECTION.values()],
    ids=[f"{v}-{d}" for v in ("f0", "direction") for d in DAMAGES]
    + [*DAMAGED_F0, *DAMAGED_DIRECTION],
)
def test_a_damaged_file_is_computed_again_with_one_warning(
    args: Config,
    linear: LinearizedImageEncoder,
    passes: list[int],
    caplog: pytest.LogCaptureFixture,
    victim: str,
    damage: Callable[[Path], Any],
) -> None:
    vectors = vectors_of(linear, 1)
    first = linear_features(linear, vectors, "Emoji", args)
    (path,) = (p for p in kept(args) if (p.stem == "f0") == (victim == "f0"))
    whole = path.read_bytes()
    damage(path)
    passes.clear()
    with caplog.at_level(logging.WARNING, logger="tangent_arithmetic"):
        assert identical(linear_features(linear, vectors, "Emoji", args), first)
    assert caplog.text.count(f"{path} is damaged and computed again") == 1
    assert len(passes) == 3 and features._read(path).keys() == load(whole).keys()
    passes.clear()
    assert identical(linear_features(linear, vectors, "Emoji", args), first)
    assert passes == []


def test_what_killed_processes_left_is_removed_and_what_others_write_counts(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    (tau,) = vectors_of(linear, 1)
    linear_features(linear, [tau], "Emoji", args)
    (folder,) = {path.parent for path in kept(args)}
    left = folder / ".f0.safetensors.x1.part"
    left.mkdir()
    (left / "f0.safetensors").write_bytes(b"half" * 1000)
    size = sizes(kept(args)) - 4000
    monkeypatch.setattr(features, "CACHE_BYTES", size + 10)
    with atomic(folder / "g.safetensors") as temporary:
        temporary.write_bytes(b"12345678")
        features._prune(folder.parent)
        assert not left.exists() and len(kept(args)) == 3  # there is room for it
        temporary.write_bytes(b"12345678901")
        features._prune(folder.parent)
        assert len(kept(args)) == 2 and temporary.exists()


def age(args: Config) -> None:
    """Makes all that is kept older."""
    for path in kept(args):
        times = path.stat()
        os.utime(path, (times.st_atime - 100, times.st_mtime - 100))


def sizes(paths: set[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def test_those_unused_for_longest_make_room(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    one, other, third = vectors_of(linear, 3)
    files = {}
    for name, tau in (("one", one), ("other", other)):
        before = kept(args)
        linear_features(linear, [tau], "Emoji", args)
        files[name] = max(kept(args) - before, key=lambda path: path.stem != "f0")
        age(args)
    linear_features(linear, [one], "Emoji", args)  # the older file, used again
    age(args)
    before = kept(args)
    monkeypatch.setattr(features, "CACHE_BYTES", sizes(before))
    linear_features(linear, [third], "Emoji", args)
    assert before - kept(args) == {files["other"]}
    assert len(kept(args)) == len(before) == 3
    assert sizes(kept(args)) <= features.CACHE_BYTES


def test_what_fits_is_all_kept(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    one, other = vectors_of(linear, 2)
    linear_features(linear, [one, other], "Emoji", args)
    total = sizes(kept(args))
    for path in kept(args):
        path.unlink()
    monkeypatch.setattr(features, "CACHE_BYTES", total)
    linear_features(linear, [one], "Emoji", args)
    linear_features(linear, [other], "Emoji", args)
    assert len(kept(args)) == 3


def test_what_was_just_written_stays_if_it_fits(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch, tmp_path: Path
) -> None:
    one, other = vectors_of(linear, 2)
    alone = replace(args, cache_dir=str(tmp_path / "alone"))
    linear_features(linear, [one], "Emoji", alone)
    monkeypatch.setattr(features, "CACHE_BYTES", 10 * sizes(kept(alone)))
    linear_features(linear, [one], "EmojiVal", args)  # of another data set, in the same cache
    linear_features(linear, [other], "Emoji", args)
    assert len(kept(args)) == 4
    age(args)
    monkeypatch.setattr(features, "CACHE_BYTES", sizes(kept(alone)))
    linear_features(linear, [one], "Emoji", args)
    assert {path.name for path in kept(args)} == {path.name for path in kept(alone)}
    assert sizes(kept(args)) == sizes(kept(alone))


def test_features_that_do_not_fit_are_right_all_the_same(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    vectors = vectors_of(linear, 1)
    monkeypatch.setattr(features, "CACHE_BYTES", 0)
    for _ in range(2):
        found = linear_features(linear, vectors, "Emoji", args)
        assert not kept(args)
        assert identical(found, fresh(linear, vectors, args))


def test_a_file_that_another_process_deletes_while_it_is_read_is_no_error(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    vectors = vectors_of(linear, 1)
    first = linear_features(linear, vectors, "Emoji", args)
    utime = os.utime

    def deleted_then_touched(path: Path) -> None:
        path.unlink()
        utime(path)

    monkeypatch.setattr(features.os, "utime", deleted_then_touched)
    assert identical(linear_features(linear, vectors, "Emoji", args), first)


def test_a_file_that_another_process_deletes_while_we_prune_is_no_error(
    args: Config, linear: LinearizedImageEncoder, monkeypatch: Patch
) -> None:
    vectors = vectors_of(linear, 1)
    glob = Path.glob

    def listed_then_deleted(self: Path, pattern: str) -> Iterator[Path]:
        yield from [*glob(self, pattern), self / "0" / "gone.safetensors"]

    monkeypatch.setattr(Path, "glob", listed_then_deleted)
    found = linear_features(linear, vectors, "Emoji", args)
    assert identical(found, fresh(linear, vectors, args))


# in a sweep


def test_a_second_sweep_computes_nothing(
    args: Config, linear: LinearizedImageEncoder, passes: list[int]
) -> None:
    (tau,) = vectors_of(linear, 1)
    first = split_of(Run.of(args), linear, "Emoji").sweep(linear, tau, [0.0, 0.5, 1.0])
    assert passes == [1, 1, 1]
    passes.clear()
    again = split_of(Run.of(args), linear, "Emoji").sweep(linear, tau, [1.0, 0.25, 0.0])
    assert passes == []
    assert (again[0], again[2]) == (first[2], first[0])
    negated = split_of(Run.of(args), linear, "Emoji").sweep(linear, scale(tau, -1.0), [-1.0, -0.5])
    assert passes == [] and negated == [first[2], first[1]]
