"""Features of linear models: exact at every coefficient, computed once, then cached."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, ToTensor

from tangent_arithmetic.arithmetic import features
from tangent_arithmetic.arithmetic.features import Features, linear_features
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.linearized import LinearizedEncoder
from tangent_arithmetic.run.models import base_encoder, split_of, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import software
from tangent_arithmetic.runtime.atomic import atomic
from tangent_arithmetic.runtime.compute import Compute, Precision
from tangent_arithmetic.storage.statedict import content_hash, move, scale
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.arithmetic.tiny import Convolution, declared, pictures
from tests.miniatures import Opaque
from tests.small_suite import random_vector

ROOT = Path(__file__).resolve().parents[2]
Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
State = dict[str, Tensor]
COEF = st.floats(-2, 2, allow_subnormal=False)


@dataclass
class Case:
    """Everything that features depend on: 24 images in three batches, the last smaller."""

    cache: Path
    patch: Patch = field(default_factory=Patch)
    linear: LinearizedEncoder = field(default_factory=lambda: LinearizedEncoder(Convolution()))
    images: np.ndarray = field(default_factory=lambda: pictures().images)
    labels: np.ndarray = field(default_factory=lambda: pictures().labels)
    opaque: bool = False
    precision: Precision = "fp32"
    batch_size: int = 10
    rank: int = 0
    world_size: int = 1

    def batches(self) -> EvalBatches:
        arrays = ArrayPictures(self.images, self.labels)
        split: Any = Opaque(arrays) if self.opaque else arrays
        transform, share = self.linear.val_preprocess, (self.rank, self.world_size)
        return EvalBatches(split, transform, self.batch_size, 0, "test", *share)

    def features(self, *vectors: State, cached: bool = True) -> Features:
        compute = Compute(torch.device("cpu"), self.precision)
        cache = self.cache if cached else None
        return linear_features(self.linear, vectors, self.batches(), compute, cache)

    def vectors(self, count: int) -> list[State]:
        return [random_vector(self.linear.weights0(), seed=seed) for seed in range(count)]

    def files(self) -> set[Path]:
        """The cached files."""
        return set(self.cache.rglob("*.safetensors"))

    def size(self) -> int:
        """Their total size in bytes."""
        return sum(path.stat().st_size for path in self.files())

    def age(self) -> None:
        """Makes all cached files older."""
        for path in self.files():
            times = path.stat()
            os.utime(path, (times.st_atime - 100, times.st_mtime - 100))


@pytest.fixture
def case(tmp_path: Path, monkeypatch: Patch) -> Case:
    return Case(tmp_path / "features", monkeypatch)


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


def identical(a: Features, b: Features) -> bool:
    """Whether two features have the same bits."""
    pairs = zip((a.f0, a.labels, *a.directions), (b.f0, b.labels, *b.directions), strict=True)
    return all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# values


@pytest.mark.parametrize("cached", [False, True])
def test_features_of_the_whole_split_in_order(case: Case, cached: bool) -> None:
    one, other = case.vectors(2)
    found = case.features(one, other, cached=cached)
    images = torch.from_numpy(case.images).permute(0, 3, 1, 2) / 255
    case.linear.eval()
    theta0, names = case.linear.weights0(), case.linear.theta0()
    one, other = ({name: tau[name] for name in names} for tau in (one, other))
    with torch.no_grad():
        f0, steps = case.linear.tangents(images, [one, other])
    assert torch.equal(found.labels, torch.from_numpy(case.labels))
    assert found.labels.dtype == torch.int64 and len(found.directions) == 2
    for mine, expected in zip((found.f0, *found.directions), (f0, *steps), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == expected.shape
        assert distance(mine, expected) < 1e-5
    for a, b in ((0.0, 0.0), (1.0, 0.0), (0.3, -0.7)):
        case.linear.load_weights(move(move(theta0, one, a), other, b))
        with torch.no_grad():
            assert distance(found.at((a, b)), case.linear(images)) < 1e-5


@pytest.mark.parametrize(("pairs", "expected"), [(1, 24), (6, 12), (10**6, 3)])
def test_parts_of_a_vector_sum_to_it_however_many_images_at_a_time(
    case: Case, passes: list[int], pairs: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tau,) = case.vectors(1)
    names = list(case.linear.theta0())
    parts = [{n: tau[n] for n in names[k::3]} for k in range(3)]
    whole = case.features(tau, cached=False)
    passes.clear()
    monkeypatch.setattr(features, "PAIRS", pairs)
    found = case.features(*parts, cached=False)
    assert set(passes) == {3} and len(passes) == expected
    assert torch.equal(found.labels, whole.labels) and distance(found.f0, whole.f0) < 1e-5
    assert distance(found.at((1.0, 1.0, 1.0)), whole.at((1.0,))) < 1e-5
    assert min(float(step.norm()) for step in found.directions) > 0


@given(st.lists(st.tuples(COEF, COEF), min_size=2, max_size=2), COEF)
def test_features_are_affine_in_the_coefficients(
    points: list[tuple[float, float]], t: float
) -> None:
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


def test_each_direction_has_a_coefficient_and_moves_to_the_device() -> None:
    found = Features(torch.ones(2, 3), [torch.ones(2, 3)], torch.zeros(2, dtype=torch.int64))
    for coefs in ((), (1.0, 2.0)):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            found.at(coefs)
    moved = found.to(torch.device("meta"))
    assert {v.device.type for v in (moved.f0, moved.labels, *moved.directions)} == {"meta"}


def test_ranks_have_shares_of_the_whole_or_nothing(case: Case, passes: list[int]) -> None:
    (tau,) = case.vectors(1)
    whole = case.features(tau)
    case.world_size = 5
    for case.rank in range(5):
        share = case.features(tau)
        assert torch.equal(share.labels, whole.labels[case.rank :: 5])
        assert distance(share.f0, whole.f0[case.rank :: 5]) < 1e-5
        assert distance(share.directions[0], whole.directions[0][case.rank :: 5]) < 1e-5
    passes.clear()
    case.world_size, case.rank = 60, 50
    for _ in ("computed", "read"):
        share = case.features(tau, tau)
        assert len(share.labels) == len(share.f0) == 0 and share.labels.dtype == torch.int64
        assert [len(direction) for direction in share.directions] == [0, 0]
    assert passes == []


def test_bf16_gives_float32_features_near_those_of_float32(case: Case) -> None:
    (tau,) = case.vectors(1)
    wide = case.features(tau)
    case.precision = "bf16"
    narrow = case.features(tau)
    pairs = zip((narrow.f0, *narrow.directions), (wide.f0, *wide.directions), strict=True)
    for mine, expected in pairs:
        assert mine.dtype == torch.float32
        assert 1e-5 < distance(mine, expected) < 0.05


# the cache


def test_cached_features_are_read_and_only_missing_vectors_computed(
    case: Case, passes: list[int], caplog: Log
) -> None:
    one, other, third = case.vectors(3)
    alone = case.features(one)
    assert passes == [1, 1, 1] and len(case.files()) == 2
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    passes.clear()
    assert identical(case.features(one), alone) and passes == []
    more = case.features(other, one, third)
    assert passes == [2, 2, 2] and torch.equal(more.directions[1], alone.directions[0])
    expected = case.features(other, one, third, cached=False)
    for mine, true in zip(more.directions, expected.directions, strict=True):
        assert distance(mine, true) < 1e-5
    for path in case.files():
        path.write_bytes(b"unreadable")
    passes.clear()
    assert identical(case.features(one, cached=False), alone) and passes == [1, 1, 1]


def test_a_vector_and_its_opposite_share_a_file(case: Case, passes: list[int]) -> None:
    (tau,) = case.vectors(1)
    first = sorted(case.linear.theta0())[0]
    tau[first].view(-1)[:3] = 0.0  # leading zeros do not hide the sign
    for one, other in ((tau, scale(tau, -1.0)), (scale(tau, -1.0), tau)):
        direction = case.features(one).directions[0]
        passes.clear()
        assert torch.equal(case.features(other).directions[0], -direction)
        assert passes == [] and len(case.files()) == 2
        assert distance(direction, case.features(one, cached=False).directions[0]) < 1e-6
    both = case.features(scale(tau, -1.0), tau)
    assert torch.equal(both.directions[0], -both.directions[1])


def test_a_zero_vector_has_a_zero_direction(case: Case) -> None:
    (tau,) = case.vectors(1)
    for vector in ({}, scale(tau, 0.0)):
        for _ in ("computed", "read"):
            found = case.features(vector)
            assert found.directions[0].shape == found.f0.shape
            assert not found.directions[0].any() and found.f0.any()


# the key


def normalised(recipe: str) -> Compose:
    return declared(recipe, ToTensor(), Normalize((0.5,) * 3, (1.0,) * 3))


CHANGES: dict[str, Callable[[Case], Any]] = {
    "theta0": lambda case: next(iter(case.linear.theta0().values())).view(-1)[-1].add_(1e-2),
    "a buffer": lambda case: case.linear.weights()["before.1.running_mean"].add_(1.0),
    "an image": lambda case: np.put(case.images, -1, 7),
    "a label": lambda case: np.put(case.labels, -1, 0),
    "the order": lambda case: vars(case).update(
        images=case.images[::-1].copy(), labels=case.labels[::-1].copy()
    ),
    "the recipe": lambda case: setattr(case.linear, "val_preprocess", normalised("other")),
    "a step": lambda case: setattr(case.linear, "val_preprocess", normalised("pixels")),
    "the precision": lambda case: setattr(case, "precision", "bf16"),
    "the number of ranks": lambda case: setattr(case, "world_size", 2),
    "the model": lambda case: case.patch.setattr(LinearizedEncoder, "identity", lambda _: "other"),
    "the sources": lambda case: case.patch.setattr(software, "sources_hash", lambda _: "0" * 64),
    "a module without weights": lambda case: setattr(
        case.linear.model.module0().get_submodule("after"), "1", nn.Sigmoid()
    ),
    "a library": lambda case: case.patch.setattr(software, "libraries", lambda: {"torch": "0.0"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_key_depends_on(case: Case, passes: list[int], name: str) -> None:
    (tau,) = case.vectors(1)
    case.features(tau)
    before = case.files()
    CHANGES[name](case)
    passes.clear()
    after = case.features(tau)
    assert passes
    assert case.files() > before  # the old ones still belong to the old key
    assert identical(after, case.features(tau, cached=False))


def test_the_key_does_not_depend_on_other_things(case: Case, passes: list[int]) -> None:
    (tau,) = case.vectors(1)
    before = case.features(tau)
    passes.clear()
    parameters = {name: tau[name] for name in case.linear.theta0()}
    case.linear.load_weights(move(case.linear.weights(), parameters, 0.5))
    case.linear.train()
    case.batch_size = 7
    assert len(parameters) < len(tau)  # buffers of a vector are ignored
    for vector in (tau, parameters, {name: tau[name] for name in reversed(tau)}):
        assert identical(case.features(vector), before)
    assert passes == []


def shift(by: float) -> Callable[[Tensor], Tensor]:
    """A function whose repr holds its address."""
    return lambda images: images + by


def test_the_address_of_a_function_is_not_in_the_key(case: Case, passes: list[int]) -> None:
    keep = [shift(0.5), shift(0.5)]
    for step in keep:
        case.linear.val_preprocess = declared("shifted by 0.5", ToTensor(), step)
        case.features()
    assert repr(keep[0]) != repr(keep[1]) and len(passes) == 3


@pytest.mark.slow
def test_another_process_has_the_same_key(case: Case) -> None:
    torch.manual_seed(0)
    code = (
        "import sys, torch; from pathlib import Path; torch.manual_seed(0)\n"
        "from tests.arithmetic.test_features import Case; Case(Path(sys.argv[1])).features()"
    )
    subprocess.run([sys.executable, "-c", code, str(case.cache)], cwd=ROOT, check=True)
    torch.manual_seed(0)
    before = case.files()
    case.linear = LinearizedEncoder(Convolution())
    case.features()
    assert len(before) == 1 and case.files() == before


class Shift:
    """A transform whose repr does not tell what it does."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, images: Tensor) -> Tensor:
        return images + self.by

    def __repr__(self) -> str:
        return "Shift()"


@pytest.mark.parametrize("make", [Shift, shift])
def test_without_a_recipe_nothing_is_cached(
    case: Case, make: Callable[[float], Any], caplog: Log
) -> None:
    (tau,) = case.vectors(1)
    found = []
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        for by in (0.0, 1.0):
            case.linear.val_preprocess = Compose([ToTensor(), make(by)])
            found.append(case.features(tau))
            assert identical(found[-1], case.features(tau, cached=False))
    assert not identical(*found)
    assert not case.files() and "preprocessing declares no recipe" in caplog.text


OWN = """
from tests.arithmetic.tiny import Convolution
class Own(Convolution):
    def forward(self, images):
        return super().forward(images) * {}
"""


def test_features_of_an_encoder_whose_code_changed_are_computed_again(
    case: Case, tmp_path: Path
) -> None:
    weights, found = case.linear.model.weights(), []
    path = tmp_path / "own_encoder.py"
    for factor in (2, 3):
        path.write_text(OWN.format(factor), encoding="utf-8")
        module = types.ModuleType("own_encoder")
        module.__file__ = str(path)
        case.patch.setitem(sys.modules, "own_encoder", module)
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
        encoder = module.Own()
        encoder.load_state_dict(weights)
        case.linear = LinearizedEncoder(encoder)
        found.append(case.features())
        assert identical(case.features(), case.features(cached=False))
    torch.testing.assert_close(found[1].f0, found[0].f0 * 1.5)
    assert len(case.files()) == 2


def test_encoders_without_known_sources_are_not_cached(case: Case, caplog: Log) -> None:
    case.patch.setattr("inspect.getsourcefile", _no_source)
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        case.features()
    assert not case.files() and "a source of the encoder is unknown" in caplog.text


def _no_source(one: object) -> str:
    raise TypeError(f"{one} is a built-in class")


def test_features_of_images_without_identity_are_not_cached(
    case: Case, passes: list[int], caplog: Log
) -> None:
    case.opaque = True
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        case.features()
    case.features()
    assert len(passes) == 6 and not case.files() and "images have no identity" in caplog.text


# damage and size


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda content: bytes(byte ^ (i == at % len(content)) for i, byte in enumerate(content))


def overwrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def rewrite(change: Callable[[State], State]) -> Callable[[Path], None]:
    """A file of other tensors, with their checksum."""

    def damage(path: Path) -> None:
        tensors = change(load_file(path))
        save_file(tensors, path, metadata={"hash": content_hash(tensors)})

    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": overwrite(lambda content: b""),
    "garbage": overwrite(lambda content: b"no tensors" * 9),
    "cut short": overwrite(lambda content: content[:-99]),
    "a bit of the numbers": overwrite(flip(-5)),
    "a bit further on": overwrite(flip(-400)),
    "without a checksum": lambda path: save_file(load_file(path), path),
    "fewer images": rewrite(lambda t: {name: value[:-1] for name, value in t.items()}),
    "a missing key": rewrite(lambda t: {"other": t["features"]}),
    "f0: other labels": rewrite(lambda t: {**t, "labels": t["labels"] + 1}),
    "direction: narrower": rewrite(lambda t: {"features": t["features"][:, :-1].contiguous()}),
}


@pytest.mark.parametrize(
    ("victim", "name"),
    [(v, n) for v in ("f0", "direction") for n in DAMAGES if ":" not in n or n.startswith(v)],
)
def test_a_damaged_file_is_recomputed_with_one_warning(
    case: Case, passes: list[int], caplog: Log, victim: str, name: str
) -> None:
    (tau,) = case.vectors(1)
    before = case.features(tau)
    (path,) = (p for p in case.files() if (p.stem == "f0") == (victim == "f0"))
    names = load_file(path).keys()
    DAMAGES[name](path)
    passes.clear()
    with caplog.at_level(logging.WARNING, logger="tangent_arithmetic"):
        assert identical(case.features(tau), before)
    assert caplog.text.count(f"{path} is damaged and computed again") == 1
    assert len(passes) == 3 and load_file(path).keys() == names
    passes.clear()
    assert identical(case.features(tau), before) and passes == []


def test_an_unwritable_cache_is_not_an_error(case: Case, caplog: Log) -> None:
    case.cache.write_text("in the place of the folder")
    assert identical(case.features(), case.features(cached=False))
    assert "features are not cached" in caplog.text


def test_leftovers_are_removed_and_files_being_written_count(case: Case) -> None:
    case.features(*case.vectors(1))
    (folder,) = {path.parent for path in case.files()}
    size = case.size()
    leftover = folder / ".f0.safetensors.x1_abcde.tangent.part"
    leftover.mkdir()
    (leftover / "f0.safetensors").write_bytes(b"half" * 1000)
    case.patch.setattr(features, "CACHE_BYTES", size + 10)
    with atomic(folder / "g.safetensors") as temporary:
        temporary.write_bytes(b"12345678")
        features._prune(folder.parent)
        assert not leftover.exists() and len(case.files()) == 3  # there is room for it
        temporary.write_bytes(b"12345678901")
        features._prune(folder.parent)
        assert len(case.files()) == 2 and temporary.exists()


def test_pruning_beside_other_writers_never_fails(tmp_path: Path) -> None:
    """Their temporary folders vanish while it looks through the cache."""
    stop = threading.Event()

    def write(place: int) -> None:
        while not stop.is_set():
            with atomic(tmp_path / f"{place % 2}" / f"{place}.safetensors", fsync=False) as path:
                path.write_bytes(b"1")

    writers = [threading.Thread(target=write, args=(place,)) for place in range(4)]
    try:
        for writer in writers:
            writer.start()
        for _ in range(300):
            features._prune(tmp_path)
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert len([*tmp_path.rglob("*.safetensors")]) == 4


def test_the_least_recently_used_are_deleted(case: Case) -> None:
    one, other, third = case.vectors(3)
    victims = []
    for tau in (one, other):
        before = case.files()
        case.features(tau)
        victims.append(max(case.files() - before, key=lambda path: path.stem != "f0"))
        case.age()
    case.features(one)  # the older file, used again
    case.age()
    before = case.files()
    case.patch.setattr(features, "CACHE_BYTES", case.size())
    case.features(third)
    assert before - case.files() == {victims[1]}
    assert len(case.files()) == len(before) == 3 and case.size() <= features.CACHE_BYTES
    case.age()
    kept = case.files()
    case.images = case.images[::-1].copy()  # another data set in the same cache
    case.patch.setattr(features, "CACHE_BYTES", case.size() - 1)
    case.features(one)
    assert len(case.files() - kept) == 2  # what was just written stays if it fits


def test_features_that_do_not_fit_are_not_cached(case: Case) -> None:
    case.patch.setattr(features, "CACHE_BYTES", 0)
    for _ in range(2):
        found = case.features(*case.vectors(1))
        assert not case.files()
        assert identical(found, case.features(*case.vectors(1), cached=False))


def test_files_deleted_by_another_process_are_not_an_error(case: Case) -> None:
    before = case.features(*case.vectors(1))
    utime, glob = os.utime, Path.glob

    def deleted_then_touched(path: Path, *times: Any) -> None:
        if not times:
            path.unlink()
        utime(path, *times)

    def listed_then_deleted(self: Path, pattern: str) -> Iterator[Path]:
        yield from [*glob(self, pattern), self / "0" / "gone.safetensors"]

    case.patch.setattr(features.os, "utime", deleted_then_touched)
    case.patch.setattr(Path, "glob", listed_then_deleted)
    for _ in ("read while deleted", "computed and pruned"):
        assert identical(case.features(*case.vectors(1)), before)


# in a sweep


def test_a_second_sweep_computes_nothing(case: Case, passes: list[int]) -> None:
    (tau,) = case.vectors(1)
    split = Split("test", nn.Identity(), case.batches(), cache=case.cache)
    first = split.sweep(case.linear, tau, [0.0, 0.5, 1.0])
    assert passes == [1, 1, 1] and len(set(first)) > 1
    passes.clear()
    again = split.sweep(case.linear, tau, [1.0, 0.25, 0.0])
    assert (again[0], again[2]) == (first[2], first[0])
    negated = split.sweep(case.linear, scale(tau, -1.0), [-1.0, -0.5])
    assert passes == [] and negated == [first[2], first[1]]


def test_a_run_caches_the_features_of_real_encoders(run: Run, passes: list[int]) -> None:
    encoder, _ = zeroshot_encoder(run)
    linear = base_encoder(encoder, "linear")
    for name in ("EmojiVal", "EmojiVal"):
        split_of(run, linear, name).accuracy(linear)
    assert len(passes) <= 1  # one batch
    uncached = run.with_(feature_cache=False)
    for count in (1, 2):
        passes.clear()
        for _ in range(count):
            split_of(uncached, linear, "EmojiVal").accuracy(linear)
        assert len(passes) == count
    assert re.fullmatch("[0-9a-f]{32}", next((run.cache / "features").iterdir()).name)
