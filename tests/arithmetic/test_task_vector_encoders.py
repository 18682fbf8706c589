"""Task vectors of CLIP encoders: standard, linear, in files, with batch normalisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.task_vectors import (
    LinearizedTaskVector,
    NonLinearTaskVector,
    TaskVector,
    linear_to_nonlinear,
    nonlinear_to_linear,
    weights_of,
)
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import ImageEncoders, LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.storage.statedict import content_hash

NAME = "ViT-Nano-8"


def _noisy(encoder: ImageEncoder, seed: int) -> ImageEncoder:
    """A copy of an encoder at nearby weights."""
    other, generator = copy.deepcopy(encoder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.01 * torch.randn(value.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def zeroshot() -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageEncoder.without_weights(NAME).eval()


@pytest.fixture(scope="module")
def finetuned(zeroshot: ImageEncoder) -> ImageEncoder:
    return _noisy(zeroshot, 1)


@pytest.fixture(scope="module")
def linear(zeroshot: ImageEncoder, finetuned: ImageEncoder) -> LinearizedImageEncoder:
    return LinearizedImageEncoder(image_encoder=finetuned, init_encoder=zeroshot)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def _assert_between(
    encoder: ImageEncoders,
    zeroshot: ImageEncoder,
    finetuned: ImageEncoder,
    coef: float,
    fixed: set[str] | None = None,
) -> None:
    """The weights are theta0 + coef * (theta - theta0), except for the fixed ones."""
    start, end = zeroshot.weights(), finetuned.weights()
    assert encoder.weights().keys() == start.keys()
    for name, value in encoder.weights().items():
        if name in (fixed or ()):
            assert value.dtype == start[name].dtype and torch.equal(value, start[name])
        else:
            expected = start[name].double() + coef * (end[name].double() - start[name].double())
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


SOURCES: dict[str, Callable[[ImageEncoder, Path], Any]] = {
    "encoder": lambda encoder, folder: encoder,
    "linear encoder": lambda encoder, folder: LinearizedImageEncoder(image_encoder=encoder),
    "path": lambda encoder, folder: encoder.save(folder / "zeroshot.pt") and folder / "zeroshot.pt",
    "string": lambda encoder, folder: encoder.save(folder / "z.pt") and str(folder / "z.pt"),
    "linear file": lambda encoder, folder: (
        LinearizedImageEncoder(image_encoder=encoder).save(folder / "linear_zeroshot.pt")
        and folder / "linear_zeroshot.pt"
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("vector", [NonLinearTaskVector, LinearizedTaskVector])
def test_apply_to_moves_every_kind_of_source(
    kind: str,
    vector: type[TaskVector],
    zeroshot: ImageEncoder,
    finetuned: ImageEncoder,
    tmp_path: Path,
) -> None:
    source = SOURCES[kind](zeroshot, tmp_path)
    before = content_hash(weights_of(source))
    tau = vector(source, finetuned)
    moved = tau.apply_to(source, 0.5)
    assert isinstance(moved, LinearizedImageEncoder) == (vector is LinearizedTaskVector)
    _assert_between(moved, zeroshot, finetuned, 0.5)
    if isinstance(moved, LinearizedImageEncoder):
        assert content_hash(moved.weights0()) == content_hash(zeroshot.weights())
    else:
        assert type(moved) is ImageEncoder
    assert content_hash(weights_of(source)) == before  # unchanged
    _assert_between(tau.apply_to(source), zeroshot, finetuned, 1.0)


def test_apply_to_nonlinear_accepts_both_public_signatures(
    zeroshot: ImageEncoder, finetuned: ImageEncoder
) -> None:
    tau = LinearizedTaskVector(zeroshot, finetuned)
    names = list(dict(zeroshot.named_parameters()))
    for coef, arguments, keywords in (
        (0.5, (0.5,), {}),
        (0.5, (names, 0.5), {}),
        (0.5, (names,), {"scaling_coef": 0.5}),
        (0.5, (), {"scaling_coef": 0.5}),
        (0.5, (np.float64(0.5),), {}),
        (0.5, (np.float32(0.5),), {}),
        (0.5, (torch.tensor(0.5),), {}),
        (0.0, (0,), {}),
        (1.0, (), {}),
    ):
        arguments_of: Any = arguments
        moved = tau.apply_to_nonlinear(zeroshot, *arguments_of, **keywords)
        assert type(moved) is ImageEncoder
        _assert_between(moved, zeroshot, finetuned, coef)


@torch.no_grad()
def test_vectors_of_both_kinds_are_interchangeable(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, linear: LinearizedImageEncoder, images: Tensor
) -> None:
    from_linear = LinearizedTaskVector(zeroshot, linear)
    from_standard = NonLinearTaskVector(zeroshot, finetuned)
    np.testing.assert_allclose((from_linear - from_standard).norm().item(), 0.0, atol=1e-12)
    nonlinear = linear_to_nonlinear(from_linear).apply_to(zeroshot)
    torch.testing.assert_close(nonlinear(images), finetuned(images), rtol=1e-5, atol=1e-5)
    at = {c: from_standard.apply_to_linear(zeroshot, c)(images).double() for c in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(at[0.0], zeroshot(images).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(at[1.0], linear(images).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(at[0.5], (at[0.0] + at[1.0]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(at[0.0], at[1.0], atol=1e-3)


def test_only_the_vision_tower_of_a_whole_clip_moves(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, args: Callable[..., Any]
) -> None:
    whole = ImageEncoder(args(), keep_lang=True)
    text = whole.model.get_parameter("token_embedding.weight").detach().clone()
    tau = NonLinearTaskVector(zeroshot, finetuned)
    moved = tau.apply_to(whole, 2.0)
    assert torch.equal(moved.model.token_embedding.weight, text)
    name = "model.visual.proj"
    expected = whole.get_parameter(name) + 2.0 * tau.vector[name]
    torch.testing.assert_close(moved.model.visual.proj, expected)
    assert tau.apply_to_linear(whole, 2.0).weights().keys() == zeroshot.weights().keys()


@torch.no_grad()
def test_batch_normalisation_of_standard_and_linear_models(
    resnet: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = ImageEncoder.without_weights(resnet)
    tuned = _noisy(base, 3).train()
    for _ in range(3):
        tuned(torch.randn(4, 3, 32, 32))
    base.eval()
    tuned.eval()
    assert tuned.weights()["model.visual.bn1.num_batches_tracked"].item() == 3
    tau = NonLinearTaskVector(base, tuned)
    counts = {name for name in base.weights() if name.endswith("num_batches_tracked")}
    running = {name for name in base.weights() if "running_" in name}
    assert len(counts) > 10 and not counts & tau.vector.keys()
    assert running == tau.buffers
    _assert_between(tau.apply_to(base, 0.5), base, tuned, 0.5, fixed=counts)
    caplog.set_level("INFO")
    linear = nonlinear_to_linear(tau).apply_to(base, 0.5)
    _assert_between(linear, base, tuned, 0.5, fixed=counts | running)
    posthoc = tau.apply_to_linear(base, scaling_coef=0.5)
    assert content_hash(posthoc.weights()) == content_hash(linear.weights())
    assert sum("take no part in a linear model" in each.message for each in caplog.records) <= 1
    linear.save(tmp_path / "linear_finetuned.pt")
    _assert_same(LinearizedImageEncoder.load(tmp_path / "linear_finetuned.pt"), linear)


# --- linear encoders in files


def _assert_same(one: LinearizedImageEncoder, other: LinearizedImageEncoder) -> None:
    assert content_hash(one.weights()) == content_hash(other.weights())
    assert content_hash(one.weights0()) == content_hash(other.weights0())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(one(images), other(images))


@pytest.mark.parametrize(
    "name",
    ["linear_finetuned.pt", "zeroshot.pt", "encoder", "weights.v1.bin", "head.pth", "deep/er/f.pt"],
)
def test_linear_encoders_round_trip_under_any_name(
    name: str, finetuned: ImageEncoder, linear: LinearizedImageEncoder, tmp_path: Path
) -> None:
    assert linear.save(tmp_path / name) == content_hash(finetuned.weights())
    loaded = LinearizedImageEncoder.load(str(tmp_path / name))
    _assert_same(loaded, linear)
    assert loaded.model_name == NAME


@pytest.mark.parametrize("place", ["zeroshot.pt", "MNISTVal/zeroshot.pt"])
def test_theta0_is_stored_once(
    place: str,
    zeroshot: ImageEncoder,
    linear: LinearizedImageEncoder,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeroshot.save(tmp_path / place)
    file = tmp_path / "MNISTVal" / "linear_finetuned.safetensors"
    whole = tmp_path / "elsewhere" / "MNISTVal" / "linear_finetuned.safetensors"
    for path in (file, whole):
        linear.save(path)
        _assert_same(LinearizedImageEncoder.load(path), linear)
    assert file.stat().st_size < 0.6 * whole.stat().st_size
    assert read_facts(file)["theta0_hash"] == content_hash(zeroshot.weights())
    start = tmp_path / "MNISTVal" / "linear_zeroshot.pt"
    with torch.no_grad():
        moved = LinearizedTaskVector(start, tmp_path / "MNIST/linear_finetuned.pt").apply_to(start)
        torch.testing.assert_close(moved(images), linear(images), rtol=1e-5, atol=1e-5)
    monkeypatch.chdir(file.parent)
    _assert_same(LinearizedImageEncoder.load("linear_finetuned.pt"), linear)


def test_a_standard_checkpoint_is_linearised_at_its_own_weights(
    finetuned: ImageEncoder, tmp_path: Path
) -> None:
    finetuned.save(tmp_path / "finetuned.pt")
    encoder = LinearizedImageEncoder.load(tmp_path / "finetuned.pt")
    expected = content_hash(finetuned.weights())
    assert content_hash(encoder.weights()) == content_hash(encoder.weights0()) == expected
    with pytest.raises(ValueError, match="expected args or image_encoder, got neither"):
        LinearizedImageEncoder()
