"""Task vectors obey the laws of a vector space and move encoders of both kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.task_vectors import (
    LinearizedTaskVector,
    NonLinearTaskVector,
    TaskVector,
    linear_to_nonlinear,
    nonlinear_to_linear,
    weights_of,
)
from tangent_arithmetic.encoders.images import ImageEncoder
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.runtime.errors import MissingFileError
from tangent_arithmetic.storage.statedict import content_hash
from tangent_arithmetic.tangent.linearized import LinearizedModel

NAME = "ViT-Nano-8"
KINDS = (TaskVector, NonLinearTaskVector, LinearizedTaskVector)


# --- the vector space


def _vector(values: np.ndarray, kind: type[TaskVector] = NonLinearTaskVector) -> TaskVector:
    tensors = torch.from_numpy(values.copy())
    return kind(vector={"b.weight": tensors[2:].reshape(1, 3), "a": tensors[:2]})


def _values(tau: TaskVector) -> np.ndarray:
    assert set(tau.vector) == {"a", "b.weight"}
    return np.concatenate([tau.vector[name].numpy().reshape(-1) for name in ("a", "b.weight")])


arrays = hnp.arrays(np.float64, 5, elements=st.floats(-100, 100, width=16))
numbers = st.floats(-10, 10, width=16)


@given(arrays, arrays, arrays)
def test_addition_is_that_of_a_vector_space(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    a, b, c = map(_vector, (x, y, z))
    np.testing.assert_array_equal(_values(a + b), x + y)
    np.testing.assert_array_equal(_values(a + b), _values(b + a))
    np.testing.assert_allclose(_values((a + b) + c), _values(a + (b + c)), rtol=1e-12, atol=1e-10)
    terms: list[Any] = [a, b, c]
    np.testing.assert_array_equal(_values(sum(terms)), _values(a + b + c))
    np.testing.assert_array_equal(_values(a - b), x - y)
    np.testing.assert_array_equal(_values(-a), -x)
    np.testing.assert_array_equal(_values(a - b), _values(a + -b))


@given(arrays, arrays, numbers, numbers)
def test_scaling_is_that_of_a_vector_space(
    x: np.ndarray, y: np.ndarray, s: float, t: float
) -> None:
    a, b = _vector(x), _vector(y)
    np.testing.assert_array_equal(_values(s * a), s * x)
    np.testing.assert_array_equal(_values(a * s), s * x)
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-9)
    close(_values(s * (a + b)), _values(s * a + s * b))
    close(_values((s + t) * a), _values(s * a + t * a))
    if abs(s) > 1e-3:
        close(_values(a / s), x / s)


@given(arrays, st.sampled_from([1, 2, 3, 2.0]))
def test_powers_are_by_element(x: np.ndarray, exponent: float) -> None:
    np.testing.assert_allclose(_values(_vector(x) ** exponent), x**exponent, rtol=1e-12)


@given(arrays, arrays)
def test_inner_products_agree_with_numpy(x: np.ndarray, y: np.ndarray) -> None:
    a, b = _vector(x), _vector(y)
    np.testing.assert_allclose(a.dot(b).item(), np.dot(x, y), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(a.norm().item(), np.linalg.norm(x), rtol=1e-12)
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    assume(lengths > 1e-6)
    np.testing.assert_allclose(a.cosine(b).item(), np.dot(x, y) / lengths, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "half",
    [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), 0.5],
    ids=["float64", "float32", "tensor", "float"],
)
def test_factors_may_be_numbers_of_any_library(half: Any) -> None:
    tau = _vector(np.arange(5.0))
    for scaled in (half * tau, tau * half):
        assert type(scaled) is NonLinearTaskVector
        np.testing.assert_array_equal(_values(scaled), np.arange(5.0) / 2)


def test_sums_of_products_are_accumulated_in_float64() -> None:
    """In float32 the one is lost beside 1e8, and the sum of squares overflows."""
    tau = TaskVector(vector={"w": torch.tensor([1e8, 1.0, -1e8])})
    ones = TaskVector(vector={"w": torch.ones(3)})
    assert tau.dot(ones).item() == 1.0
    big = TaskVector(vector={"w": torch.tensor([3e30, 4e30])})
    np.testing.assert_allclose(big.norm().item(), 5e30, rtol=1e-6)


def test_operators_leave_their_operands_alone() -> None:
    x, y = np.arange(5.0), np.arange(5.0) ** 2
    a, b = _vector(x), _vector(y)
    for result in (a + b, a - b, -a, 2 * a, a / 2, a**2, sum([a])):
        assert isinstance(result, TaskVector)
        result.vector["new"] = torch.ones(1)
    np.testing.assert_array_equal(_values(a), x)
    np.testing.assert_array_equal(_values(b), y)


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_kinds_mix_and_the_left_one_wins(left: type[TaskVector], right: type[TaskVector]) -> None:
    a, b = _vector(np.ones(5), left), _vector(np.arange(5.0), right)
    assert type(a + b) is type(a - b) is type(sum([a, b])) is left
    np.testing.assert_array_equal(_values(a + b), np.arange(5.0) + 1)
    assert type(-a) is type(0.5 * a) is type(a / 2) is type(a**2) is left
    assert a.dot(b).item() == 10.0


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: a + 1,
        lambda a: 1 + a,
        lambda a: a + "x",
        lambda a: a - 1,
        lambda a: a * a,
        lambda a: a / a,
        lambda a: 1 / a,
    ],
    ids=["a + 1", "1 + a", "a + x", "a - 1", "a * a", "a / a", "1 / a"],
)
def test_what_has_no_meaning_is_refused(operation: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        operation(_vector(np.ones(5)))


def test_vectors_of_different_models_do_not_mix() -> None:
    one = TaskVector(vector={"w": torch.ones(2), "x": torch.ones(1)})
    other = TaskVector(vector={"w": torch.ones(3), "y": torch.ones(1)})
    message = r"(?s)only in the first: x.*only in the second: y.*w: shape \(2,\) against \(3,\)"
    for operation in (lambda: one + other, lambda: one - other, lambda: one.dot(other)):
        with pytest.raises(ValueError, match=message):
            operation()


def test_repr_tells_kind_size_and_norm() -> None:
    tau = LinearizedTaskVector(vector={"w": torch.full((2000,), 0.5)})
    assert repr(tau) == "LinearizedTaskVector(2,000 weights, norm 22.36)"


def test_casts_keep_the_numbers() -> None:
    tau = _vector(np.arange(5.0))
    linear = nonlinear_to_linear(tau)
    back = linear_to_nonlinear(linear, ["any", "names"])
    assert type(linear) is LinearizedTaskVector and type(back) is NonLinearTaskVector
    np.testing.assert_array_equal(_values(linear), np.arange(5.0))
    np.testing.assert_array_equal(_values(back), np.arange(5.0))
    assert linear.get_named_parameters(["any", "names"]).keys() == tau.vector.keys()


# --- constructors


def test_a_vector_comes_one_way_or_the_other() -> None:
    model = nn.Linear(1, 1)
    vector = {"weight": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="expected a vector or two checkpoints, got both"):
        TaskVector(model, model, vector)
    with pytest.raises(ValueError, match="expected a vector or two checkpoints, got both"):
        TaskVector(finetuned_checkpoint=model, vector=vector)
    for half in ({}, {"pretrained_checkpoint": model}, {"finetuned_checkpoint": model}):
        with pytest.raises(ValueError, match="expected pretrained_checkpoint and finetuned_check"):
            TaskVector(**half)  # type: ignore[arg-type]


def test_other_architectures_are_refused() -> None:
    message = r"(?s)fine-tuned and pre-trained weights do not match.*weight: shape \(1, 2\)"
    with pytest.raises(ValueError, match=message):
        TaskVector(nn.Linear(1, 1), nn.Linear(2, 1))


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no checkpoint at .*nowhere\.pt"):
        TaskVector(nn.Linear(1, 1), tmp_path / "nowhere.pt")


def test_differences_of_half_precision_are_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    other = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    nn.init.constant_(other.weight, 1 + 2**-10)  # 1 in bfloat16
    tau = TaskVector(model, other)
    assert tau.vector["weight"].dtype == torch.float32
    assert tau.vector["weight"].item() == 2**-10
    assert not tau.vector["weight"].requires_grad


# --- applied to plain modules


def _normalised() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_plain_modules_move_with_their_statistics_but_not_their_counts() -> None:
    base, tuned = _normalised(), _normalised().train()
    base.get_buffer("1.num_batches_tracked").fill_(3)
    for _ in range(4):
        tuned(torch.randn(8, 3))
    tau = TaskVector(base, tuned)
    assert set(tau.vector) == set(base.state_dict()) - {"1.num_batches_tracked"}
    before = copy.deepcopy(base.state_dict())

    moved = tau.apply_to(base, 0.5)
    assert type(moved) is nn.Sequential and moved is not base
    for name, value in moved.state_dict().items():
        start, end = before[name].double(), tuned.state_dict()[name].double()
        expected = start if name == "1.num_batches_tracked" else (start + end) / 2
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(base.state_dict()[name], before[name])
    assert not torch.equal(moved.get_buffer("1.running_mean"), before["1.running_mean"])


def test_half_precision_weights_keep_their_type() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    tau = TaskVector(vector={"bias": torch.ones(2)})
    moved = tau.apply_to(model)
    assert moved.bias.dtype == torch.bfloat16
    assert torch.equal(moved.bias, (model.bias.float() + 1).bfloat16())
    assert torch.equal(moved.weight, model.weight)


def test_what_a_module_does_not_have_cannot_be_moved() -> None:
    tau = TaskVector(vector={"weight": torch.ones(3, 2), "scale": torch.ones(1)})
    message = r"(?s)only in the second: scale.*weight: shape \(2, 2\) against \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        tau.apply_to(nn.Linear(2, 2))


def test_plain_modules_are_linearised() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    tau = LinearizedTaskVector(
        vector={name: torch.randn_like(value) for name, value in model.named_parameters()}
    )
    x = torch.randn(4, 2).double()
    found = tau.apply_to(model, scaling_coef=0.5)
    assert isinstance(found, LinearizedModel)
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(
        dict(model.named_parameters())
    )
    step = sum(
        torch.einsum("bo...,...->bo", jacobian[name], value) for name, value in tau.vector.items()
    )
    torch.testing.assert_close(found(x), model(x) + 0.5 * step)
    standard = linear_to_nonlinear(tau).apply_to(found, scaling_coef=-0.5)
    assert isinstance(standard, nn.Sequential)
    torch.testing.assert_close(standard(x), model(x))


# --- applied to encoders


def _noisy(encoder: ImageEncoder, seed: int, amount: float = 0.01) -> ImageEncoder:
    """A copy of an encoder at nearby weights."""
    other, generator = copy.deepcopy(encoder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(amount * torch.randn(value.shape, generator=generator))
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
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def _linear(zeroshot: ImageEncoder, finetuned: ImageEncoder) -> LinearizedImageEncoder:
    return LinearizedImageEncoder(image_encoder=finetuned, init_encoder=zeroshot)


def _assert_between(
    encoder: ImageEncoder | LinearizedImageEncoder,
    zeroshot: ImageEncoder,
    finetuned: ImageEncoder,
    coef: float,
) -> None:
    """The weights are theta0 + coef * (theta - theta0), computed in float64."""
    start, end = zeroshot.weights(), finetuned.weights()
    assert encoder.weights().keys() == start.keys()
    for name, value in encoder.weights().items():
        expected = start[name].double() + coef * (end[name].double() - start[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)


def _source(kind: str, zeroshot: ImageEncoder, folder: Path) -> Any:
    """The same pre-trained weights in each form that users have them in."""
    if kind == "encoder":
        return zeroshot
    if kind == "linear encoder":
        return LinearizedImageEncoder(image_encoder=zeroshot)
    file = folder / "zeroshot.pt"
    zeroshot.save(file)
    if kind == "linear file":
        linear = folder / "other" / "linear_zeroshot.pt"
        LinearizedImageEncoder(image_encoder=zeroshot).save(linear)
        return linear
    return str(file) if kind == "string" else file


@pytest.mark.parametrize("kind", ["encoder", "linear encoder", "path", "string", "linear file"])
@pytest.mark.parametrize("vector", [NonLinearTaskVector, LinearizedTaskVector])
def test_apply_to_moves_every_kind_of_source(
    kind: str,
    vector: type[TaskVector],
    zeroshot: ImageEncoder,
    finetuned: ImageEncoder,
    tmp_path: Path,
) -> None:
    source = _source(kind, zeroshot, tmp_path)
    before = content_hash(weights_of(source))
    tau = vector(source, finetuned)
    moved = tau.apply_to(source, 0.5)
    assert type(moved) is (
        LinearizedImageEncoder if vector is LinearizedTaskVector else ImageEncoder
    )
    _assert_between(moved, zeroshot, finetuned, 0.5)
    if isinstance(moved, LinearizedImageEncoder):
        assert content_hash(moved.weights0()) == content_hash(zeroshot.weights())
    assert content_hash(weights_of(source)) == before  # untouched
    _assert_between(tau.apply_to(source), zeroshot, finetuned, 1.0)


def test_apply_to_nonlinear_reads_both_public_forms(
    zeroshot: ImageEncoder, finetuned: ImageEncoder
) -> None:
    tau = LinearizedTaskVector(zeroshot, finetuned)
    names = list(dict(zeroshot.named_parameters()))
    for moved in (
        tau.apply_to_nonlinear(zeroshot, 0.5),
        tau.apply_to_nonlinear(zeroshot, names, 0.5),
        tau.apply_to_nonlinear(zeroshot, names, scaling_coef=0.5),
        tau.apply_to_nonlinear(zeroshot, scaling_coef=0.5),
        tau.apply_to_nonlinear(zeroshot, np.float64(0.5)),
    ):
        assert type(moved) is ImageEncoder
        _assert_between(moved, zeroshot, finetuned, 0.5)
    _assert_between(tau.apply_to_nonlinear(zeroshot), zeroshot, finetuned, 1.0)
    _assert_between(tau.apply_to_nonlinear(zeroshot, 0), zeroshot, finetuned, 0.0)


@pytest.mark.parametrize("half", [np.float32(0.5), torch.tensor(0.5)], ids=["float32", "tensor"])
def test_apply_to_nonlinear_takes_numbers_of_any_library(
    half: Any, zeroshot: ImageEncoder, finetuned: ImageEncoder
) -> None:
    moved = NonLinearTaskVector(zeroshot, finetuned).apply_to_nonlinear(zeroshot, half)
    _assert_between(moved, zeroshot, finetuned, 0.5)


@torch.no_grad()
def test_vectors_cross_between_the_two_worlds(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, images: Tensor
) -> None:
    linear = _linear(zeroshot, finetuned)
    from_linear = LinearizedTaskVector(zeroshot, linear)
    from_standard = NonLinearTaskVector(zeroshot, finetuned)
    np.testing.assert_allclose((from_linear - from_standard).norm().item(), 0.0, atol=1e-12)
    nonlinear = linear_to_nonlinear(from_linear).apply_to(zeroshot)
    torch.testing.assert_close(nonlinear(images), finetuned(images), rtol=1e-5, atol=1e-5)
    back = nonlinear_to_linear(linear_to_nonlinear(from_linear)).apply_to(zeroshot)
    torch.testing.assert_close(back(images), linear(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_linear_vector_at_one_gives_the_checkpoint_s_features(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, images: Tensor, tmp_path: Path
) -> None:
    zeroshot.save(tmp_path / "zeroshot.pt")
    _linear(zeroshot, finetuned).save(tmp_path / "MNISTVal" / "linear_finetuned.pt")
    paths = tmp_path / "MNISTVal" / "linear_zeroshot.pt", tmp_path / "MNIST/linear_finetuned.pt"
    moved = LinearizedTaskVector(*paths).apply_to(paths[0])
    expected = LinearizedImageEncoder.load(paths[1])(images)
    torch.testing.assert_close(moved(images), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, zeroshot(images), atol=1e-3)


@torch.no_grad()
def test_posthoc_linearization_is_affine_in_the_coefficient(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, images: Tensor
) -> None:
    tau = NonLinearTaskVector(zeroshot, finetuned)
    at = {coef: tau.apply_to_linear(zeroshot, coef)(images).double() for coef in (0.0, 0.5, 1.0)}
    torch.testing.assert_close(at[0.0], zeroshot(images).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(at[0.5], (at[0.0] + at[1.0]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(at[0.0], at[1.0], atol=1e-3)


def test_whole_clips_move_their_vision_tower_only(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, args: Callable[..., Any]
) -> None:
    whole = ImageEncoder(args(), keep_lang=True)
    text = whole.model.get_parameter("token_embedding.weight").detach().clone()
    tau = NonLinearTaskVector(zeroshot, finetuned)
    moved = tau.apply_to(whole, 2.0)
    assert torch.equal(moved.model.token_embedding.weight, text)
    torch.testing.assert_close(
        moved.model.visual.proj,
        whole.get_parameter("model.visual.proj") + 2.0 * tau.vector["model.visual.proj"],
    )
    linear = tau.apply_to_linear(whole, 2.0)
    assert linear.weights().keys() == zeroshot.weights().keys()


@torch.no_grad()
def test_batch_normalisation_survives_both_worlds(
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
    _assert_between_running(tau.apply_to(base, 0.5), base, tuned, counts)
    caplog.set_level("INFO")
    linear = nonlinear_to_linear(tau).apply_to(base, 0.5)
    _assert_between_running(linear, base, tuned, counts | running)
    posthoc = tau.apply_to_linear(base, scaling_coef=0.5)
    assert content_hash(posthoc.weights()) == content_hash(linear.weights())
    assert sum("take no part in a linear model" in each.message for each in caplog.records) <= 1

    linear.save(tmp_path / "linear_finetuned.pt")
    read = LinearizedImageEncoder.load(tmp_path / "linear_finetuned.pt")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(read(x), linear(x))
    assert content_hash(read.weights0()) == content_hash(linear.weights0())


def _assert_between_running(
    encoder: ImageEncoder | LinearizedImageEncoder,
    base: ImageEncoder,
    tuned: ImageEncoder,
    counts: set[str],
) -> None:
    start, end = base.weights(), tuned.weights()
    for name, value in encoder.weights().items():
        if name in counts:
            assert value.dtype == start[name].dtype and torch.equal(value, start[name])
        else:
            expected = (start[name].double() + end[name].double()) / 2
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


# --- linear encoders on disk


def _same(one: LinearizedImageEncoder, other: LinearizedImageEncoder, images: Tensor) -> None:
    assert content_hash(one.weights()) == content_hash(other.weights())
    assert content_hash(one.weights0()) == content_hash(other.weights0())
    with torch.no_grad():
        assert torch.equal(one(images), other(images))


@pytest.mark.parametrize(
    "name",
    [
        "linear_finetuned.pt",
        "linear_zeroshot.pt",
        "zeroshot.pt",
        "encoder.safetensors",
        "encoder.pth",
        "encoder",
        "weights.v1.bin",
        "head_like.pt",
        "deep/er/finetuned.pt",
    ],
)
def test_linear_encoders_round_trip_through_any_name(
    name: str, zeroshot: ImageEncoder, finetuned: ImageEncoder, images: Tensor, tmp_path: Path
) -> None:
    encoder = _linear(zeroshot, finetuned)
    assert encoder.save(tmp_path / name) == content_hash(finetuned.weights())
    read = LinearizedImageEncoder.load(str(tmp_path / name))
    _same(read, encoder, images)
    assert read.model_name == NAME
    assert content_hash(read.weights0()) == content_hash(zeroshot.weights())


@pytest.mark.parametrize("place", ["zeroshot.pt", "MNISTVal/zeroshot.pt"])
def test_theta0_is_stored_once(
    place: str, zeroshot: ImageEncoder, finetuned: ImageEncoder, images: Tensor, tmp_path: Path
) -> None:
    zeroshot.save(tmp_path / place)
    encoder, task = _linear(zeroshot, finetuned), tmp_path / "MNISTVal"
    encoder.save(task / "linear_finetuned.pt")
    encoder.save(tmp_path / "elsewhere" / "MNISTVal" / "linear_finetuned.pt")
    file = task / "linear_finetuned.safetensors"
    whole = tmp_path / "elsewhere" / "MNISTVal" / "linear_finetuned.safetensors"
    assert file.stat().st_size < 0.6 * whole.stat().st_size
    assert read_facts(file)["theta0_hash"] == content_hash(zeroshot.weights())
    _same(LinearizedImageEncoder.load(file), encoder, images)
    _same(LinearizedImageEncoder.load(whole), encoder, images)


def test_other_weights_beside_it_are_not_taken_for_theta0(
    zeroshot: ImageEncoder, finetuned: ImageEncoder, images: Tensor, tmp_path: Path
) -> None:
    finetuned.save(tmp_path / "zeroshot.pt")
    encoder = _linear(zeroshot, finetuned)
    encoder.save(tmp_path / "MNISTVal" / "linear_finetuned.pt")
    _same(LinearizedImageEncoder.load(tmp_path / "MNISTVal/linear_finetuned.pt"), encoder, images)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lost_theta0_is_reported(
    replaced: bool, zeroshot: ImageEncoder, finetuned: ImageEncoder, tmp_path: Path
) -> None:
    zeroshot.save(tmp_path / "zeroshot.pt")
    _linear(zeroshot, finetuned).save(tmp_path / "MNISTVal" / "linear_finetuned.pt")
    (tmp_path / "zeroshot.safetensors").unlink()
    if replaced:
        finetuned.save(tmp_path / "zeroshot.pt")
    with pytest.raises(MissingFileError, match=r"was linearised at weights .* put that file back"):
        LinearizedImageEncoder.load(tmp_path / "MNISTVal" / "linear_finetuned.pt")


def test_theta0_is_found_from_within_the_task_s_folder(
    zeroshot: ImageEncoder,
    finetuned: ImageEncoder,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeroshot.save(tmp_path / "zeroshot.pt")
    encoder = _linear(zeroshot, finetuned)
    encoder.save(tmp_path / "MNISTVal" / "linear_finetuned.pt")
    monkeypatch.chdir(tmp_path / "MNISTVal")
    _same(LinearizedImageEncoder.load("linear_finetuned.pt"), encoder, images)


def test_a_standard_checkpoint_is_linearised_at_its_own_weights(
    finetuned: ImageEncoder, tmp_path: Path
) -> None:
    finetuned.save(tmp_path / "finetuned.pt")
    encoder = LinearizedImageEncoder.load(tmp_path / "finetuned.pt")
    expected = content_hash(finetuned.weights())
    assert content_hash(encoder.weights()) == content_hash(encoder.weights0()) == expected


def test_a_linear_encoder_needs_something_to_linearise() -> None:
    with pytest.raises(ValueError, match="expected args or image_encoder, got neither"):
        LinearizedImageEncoder()
