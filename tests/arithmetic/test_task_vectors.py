"""Task vectors obey the laws of a vector space and apply to state dicts and modules."""

from __future__ import annotations

import copy
import operator
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
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.checkpoints import save_tensors
from tangent_arithmetic.storage.statedict import content_hash
from tangent_arithmetic.tangent.linearized import LinearizedModel

KINDS = (TaskVector, NonLinearTaskVector, LinearizedTaskVector)
State = dict[str, Tensor]


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "w": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "b": torch.randn(4, generator=generator, dtype=torch.float64),
    }
    return {**weights, "steps": torch.tensor(seed)}


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
    close(_values(a.sub_interpolate(b, s)), (1 - s) * x + s * y)
    if abs(s) > 1e-3:
        close(_values(a / s), x / s)


@given(arrays, arrays, st.sampled_from([1, 2, 3, 2.0]))
def test_powers_and_inner_products_agree_with_numpy(
    x: np.ndarray, y: np.ndarray, exponent: float
) -> None:
    a, b = _vector(x), _vector(y)
    np.testing.assert_allclose(_values(a**exponent), x**exponent, rtol=1e-12)
    np.testing.assert_allclose(a.dot(b).item(), np.dot(x, y), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(a.norm().item(), np.linalg.norm(x), rtol=1e-12)
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    assume(lengths > 1e-6)
    np.testing.assert_allclose(a.cosine(b).item(), np.dot(x, y) / lengths, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("half", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), 0.5])
def test_factors_may_be_numbers_of_any_library(half: Any) -> None:
    tau = _vector(np.arange(5.0))
    for scaled in (half * tau, tau * half):
        assert type(scaled) is NonLinearTaskVector
        np.testing.assert_array_equal(_values(scaled), np.arange(5.0) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_quotients_are_computed_in_the_dtype_of_the_vector(dtype: torch.dtype) -> None:
    values = np.array([2.0, -1.0, 0.5, 0.0, 7.0])
    for divisor in (torch.tensor(3, dtype=dtype), 3):
        quotient = _vector(values) / divisor
        np.testing.assert_array_equal(_values(quotient), values / 3)
        assert quotient.vector["a"].dtype == torch.float64
    for zero in (0, 0.0, torch.tensor(0, dtype=dtype)):
        with pytest.raises(UsageError, match="cannot be divided by 0"):
            _vector(values) / zero


def test_sums_of_products_are_accumulated_in_float64() -> None:
    """In float32 the one is lost beside 1e8, and the sum of squares overflows."""
    tau = TaskVector(vector={"w": torch.tensor([1e8, 1.0, -1e8])})
    ones = TaskVector(vector={"w": torch.ones(3)})
    assert tau.dot(ones).item() == 1.0
    big = TaskVector(vector={"w": torch.tensor([3e30, 4e30])})
    np.testing.assert_allclose(big.norm().item(), 5e30, rtol=1e-6)


def test_operators_leave_their_operands_unchanged() -> None:
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
)
def test_meaningless_operations_are_refused(operation: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        operation(_vector(np.ones(5)))


def test_vectors_of_different_models_do_not_mix() -> None:
    one = TaskVector(vector={"w": torch.ones(2), "x": torch.ones(1)})
    other = TaskVector(vector={"w": torch.ones(3), "y": torch.ones(1)})
    message = r"(?s)only in the first: x.*only in the second: y.*w: shape \(2,\) against \(3,\)"
    for operation in (operator.add, operator.sub, TaskVector.dot):
        with pytest.raises(ValueError, match=message):
            operation(one, other)


def test_vectors_of_different_theta0_do_not_mix_unless_allowed() -> None:
    one, other = NonLinearTaskVector(state(0), state(1)), TaskVector(state(2), state(3))
    linear = nonlinear_to_linear(one)
    assert linear.base_hash == linear_to_nonlinear(linear).base_hash == one.base_hash
    sums: list[Callable[[], Any]] = [
        lambda: one + other,
        lambda: one - other,
        lambda: sum([one, other]),
        lambda: linear + other,
    ]
    for combine in sums:
        with pytest.raises(UsageError, match="of different pre-trained weights"):
            combine()
    both = one + TaskVector(state(2), state(3), allow_base_mismatch=True)
    assert both.base_hash is None and both.allow_base_mismatch
    torch.testing.assert_close(both.vector["w"], one.vector["w"] + other.vector["w"])
    assert (one + one).base_hash == one.base_hash == content_hash(state(0))
    assert (one + TaskVector(vector=other.vector)).base_hash == one.base_hash  # unknown


def test_casts_keep_the_numbers() -> None:
    tau = _vector(np.arange(5.0))
    linear = nonlinear_to_linear(tau)
    back = linear_to_nonlinear(linear, ["any", "names"])
    assert type(linear) is LinearizedTaskVector and type(back) is NonLinearTaskVector
    np.testing.assert_array_equal(_values(linear), np.arange(5.0))
    np.testing.assert_array_equal(_values(back), np.arange(5.0))
    assert linear.get_named_parameters(["any", "names"]).keys() == tau.vector.keys()


# --- construction and files


@pytest.mark.parametrize(
    ("operation", "form"),
    [
        ("subtract", operator.sub),
        ("add", operator.add),
        ("multiply", operator.mul),
        ("divide", operator.truediv),
    ],
)
def test_operations_are_elementwise(operation: Any, form: Callable[..., Tensor]) -> None:
    pre, ft = state(0), state(1)
    vector = TaskVector(pre, ft, operation=operation).vector
    assert vector.keys() == {"w", "b"}
    for name, value in vector.items():
        assert torch.equal(value, form(ft[name], pre[name]))


def test_quotients_that_are_not_finite_are_zero() -> None:
    pre = {"w": torch.tensor([0.0, 0.0, 1e-45, 2.0])}
    ft = {"w": torch.tensor([1.0, 0.0, 1e30, 3.0])}
    quotient = TaskVector(pre, ft, operation="divide").vector["w"]
    assert quotient.tolist() == [0.0, 0.0, 0.0, 1.5]


LINEAR = nn.Linear(1, 1)
VECTOR = {"weight": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LINEAR, LINEAR, VECTOR), "expected a vector or two checkpoints, got both"),
        ((None, LINEAR, VECTOR), "expected a vector or two checkpoints, got both"),
        ((), "expected pretrained_checkpoint and finetuned_checkpoint"),
        ((LINEAR,), "expected pretrained_checkpoint and finetuned_checkpoint"),
        ((None, LINEAR), "expected pretrained_checkpoint and finetuned_checkpoint"),
        (
            (LINEAR, nn.Linear(2, 1)),
            r"(?s)fine-tuned and pre-trained weights do not match.*weight: shape \(1, 2\)",
        ),
        (
            (LINEAR, LINEAR, None, "substract"),
            "unknown operation 'substract'; choose from subtract",
        ),
        ((LINEAR, Path("nowhere.pt")), r"no checkpoint at .*nowhere\.pt"),
    ],
)
def test_invalid_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises((ValueError, MissingFileError), match=message):
        TaskVector(*arguments)


def test_differences_of_half_precision_are_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    other = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    nn.init.constant_(other.weight, 1 + 2**-10)  # 1 in bfloat16
    tau = TaskVector(model, other)
    assert tau.vector["weight"].dtype == torch.float32
    assert tau.vector["weight"].item() == 2**-10
    assert not tau.vector["weight"].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_summed_in_float32(dtype: torch.dtype) -> None:
    small = TaskVector(vector={"w": torch.full((4,), 2.0**-12, dtype=dtype)})
    total = sum([small] * 4096, TaskVector(vector={"w": torch.ones(4, dtype=dtype)}))
    assert total.vector["w"].dtype == torch.float32
    assert total.vector["w"].tolist() == [2.0] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_saved_vectors_round_trip(kind: type[TaskVector], tmp_path: Path) -> None:
    tau = kind(state(0), state(1))
    tau.save(tmp_path / "tau.pt")
    loaded = kind.load(tmp_path / "tau.pt")
    assert type(loaded) is kind and (tmp_path / "tau.safetensors").is_file()
    assert content_hash(loaded.vector) == content_hash(tau.vector)
    assert loaded.base_hash == tau.base_hash
    assert repr(loaded) == f"{kind.__name__}(16 weights, norm {tau.norm().item():.4g})"
    save_tensors(tmp_path / "head.safetensors", {"w": torch.ones(2)}, "head")
    with pytest.raises(UsageError, match="holds a head, expected a task_vector"):
        TaskVector.load(tmp_path / "head.safetensors")


# --- application to state dicts and plain modules


def test_state_dicts_give_new_state_dicts() -> None:
    pre, ft = state(0), state(1)
    before = content_hash(pre)
    tau = TaskVector(pre, ft)
    moved = tau.apply_to(pre, scaling_coef=0.25)
    assert type(moved) is dict and moved["steps"] == 0
    for name in ("w", "b"):
        torch.testing.assert_close(moved[name], 0.75 * pre[name] + 0.25 * ft[name])
    moved["steps"] += 1
    moved["w"].zero_()
    assert content_hash(pre) == before
    with pytest.raises(TypeError, match="which has no forward pass to linearise"):
        tau.apply_to_linear(pre)


def test_modules_move_with_their_statistics_but_not_their_counts() -> None:
    base, tuned = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    for model in (base, tuned):
        model.register_buffer("shift", torch.zeros(2))
    base.get_buffer("1.num_batches_tracked").fill_(3)
    for _ in range(4):
        tuned(torch.randn(8, 3))
    tau = NonLinearTaskVector(base, tuned)
    assert set(tau.vector) == set(base.state_dict()) - {"1.num_batches_tracked"}
    assert tau.buffers == {"1.running_mean", "1.running_var", "shift"}
    before = copy.deepcopy(base.state_dict())
    moved = tau.apply_to(base, 0.5)
    assert type(moved) is nn.Sequential and moved is not base
    for name, value in moved.state_dict().items():
        start, end = before[name].double(), tuned.state_dict()[name].double()
        expected = start if name == "1.num_batches_tracked" else (start + end) / 2
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(base.state_dict()[name], before[name])
    assert not torch.equal(moved.get_buffer("1.running_mean"), before["1.running_mean"])
    # linear models have no buffers; those of a state dict are known by name only
    parameters = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert nonlinear_to_linear(tau).vector.keys() == parameters
    by_name = NonLinearTaskVector(dict(base.state_dict()), dict(tuned.state_dict()))
    assert nonlinear_to_linear(by_name).vector.keys() == parameters | {"shift"}


class Holder(nn.Module):
    """A module whose only child has the name that wrappers use."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.module = child

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        Holder,
        torch.optim.swa_utils.AveragedModel,
        lambda m: m,
        lambda m: Holder(nn.DataParallel(m)),
    ],
)
def test_wrapped_modules_have_the_names_of_plain_ones(wrap: Callable[..., Any]) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    base, tuned = plain(), plain()
    with torch.no_grad():
        tuned.get_buffer("1.running_mean").fill_(2.0)
    expected = TaskVector(base, tuned)
    for pair in ((base, wrap(tuned)), (wrap(base), tuned), (wrap(base), wrap(tuned))):
        tau = TaskVector(*pair)
        assert tau.buffers == expected.buffers == {"1.running_mean", "1.running_var"}
        assert tau.base_hash == expected.base_hash
        assert content_hash(tau.vector) == content_hash(expected.vector)
        for model in (base, wrap(base)):
            names = model.state_dict()
            moved, state = tau.apply_to(model), tau.apply_to(names)
            assert moved.state_dict().keys() == names.keys() >= state.keys()
            for name, value in state.items():
                assert torch.equal(moved.state_dict()[name], value)
                torch.testing.assert_close(value, tuned.state_dict()[bare(name)])
    x = torch.randn(4, 3)
    linear = expected.apply_to_linear(Holder(base))
    torch.testing.assert_close(linear(x), expected.apply_to_linear(base)(x))
    by_hand = {name: torch.ones_like(p) for name, p in wrap(base).named_parameters()}
    moved = TaskVector(vector=by_hand).apply_to(wrap(base))
    for name, value in moved.named_parameters():
        assert torch.equal(value, base.get_parameter(bare(name)) + 1)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        partial(torch.compile, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    ],
)
def test_wrapped_linear_models_are_linear_models(wrap: Callable[..., Any]) -> None:
    base, tuned, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    wrapped, expected = wrap(LinearizedModel(tuned, base)), TaskVector(base, tuned)
    assert weights_of(wrapped).keys() == {"weight", "bias"}
    tau = TaskVector(base, wrapped)
    assert content_hash(tau.vector) == content_hash(expected.vector)
    torch.testing.assert_close(tau.apply_to(wrap(LinearizedModel(base)))(x), tuned(x))
    linear = tau.apply_to_linear(wrap(LinearizedModel(base)))
    assert isinstance(linear, LinearizedModel)
    torch.testing.assert_close(linear(x), tuned(x))


class Positioned(nn.Module):
    """A module with a buffer of floating-point numbers and a tensor as its extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("position", torch.randn(3))

    def get_extra_state(self) -> Tensor:
        return torch.ones(1, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + self.get_buffer("position"))


def test_buffers_and_extra_state_take_no_part_in_linear_models() -> None:
    base, tuned, x = Positioned(), Positioned(), torch.randn(4, 3)
    by_name, known = TaskVector(base.state_dict(), tuned.state_dict()), TaskVector(base, tuned)
    expected = known.apply_to_linear(base)
    torch.testing.assert_close(by_name.apply_to_linear(base)(x), expected(x))
    tau = TaskVector(base, expected)
    torch.testing.assert_close(tau.apply_to(base).inner.weight, tuned.inner.weight)


def test_a_state_dict_with_other_names_is_refused_of_a_linear_model() -> None:
    def rename(_: Any, state: dict[str, Any], prefix: str, *__: Any) -> None:
        state[f"{prefix}old"] = state.pop(f"{prefix}weight")

    base, tuned = nn.Linear(3, 2), nn.Linear(3, 2)
    for model in (base, tuned):
        model.register_state_dict_post_hook(rename)
    tau = TaskVector(base, tuned)
    torch.testing.assert_close(tau.apply_to(base).weight, tuned.weight)
    with pytest.raises(UsageError, match="got also old: a hook of Linear renames them"):
        tau.apply_to_linear(base)


def bare(name: str) -> str:
    return name.replace("module.", "").replace("_orig_mod.", "")


class Keeping(nn.Module):
    """A module that keeps what it computes: its output, and a cache of its weight."""

    cache: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = 2 * self.inner.weight
        self.out = x @ self.cache.T + self.inner(x)
        return self.out


def normalised() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        made: nn.Module = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    return made


@pytest.mark.parametrize("build", [Keeping, normalised])
def test_a_module_moves_after_a_training_step(build: Callable[[], nn.Module]) -> None:
    base, tuned, x = build(), build(), torch.randn(4, 3)
    base(x).sum().backward()
    torch.testing.assert_close(TaskVector(base, tuned).apply_to(base)(x), tuned(x))


class Cloning(nn.Linear):
    """A module whose state dict holds copies."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {n: v.clone() for n, v in super().state_dict(*args, **kwargs).items()}


def test_a_module_whose_state_dict_holds_copies_is_refused() -> None:
    with pytest.raises(UsageError, match="weights of Cloning that can be set, got copies of 2"):
        TaskVector(Cloning(3, 2), Cloning(3, 2)).apply_to(Cloning(3, 2))


def test_a_module_that_encloses_parts_of_itself_is_not_copied() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 2))
    model.head = lambda x: model[0](x)
    tau = TaskVector(vector={"0.bias": torch.ones(2)})
    with pytest.raises(UsageError, match="enclose parts of it in head"):
        tau.apply_to(model)


def test_half_precision_weights_keep_their_type() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    moved = TaskVector(vector={"bias": torch.ones(2)}).apply_to(model)
    assert moved.bias.dtype == torch.bfloat16
    assert torch.equal(moved.bias, (model.bias.float() + 1).bfloat16())
    assert torch.equal(moved.weight, model.weight)


def test_weights_that_a_module_lacks_are_refused() -> None:
    tau = TaskVector(vector={"weight": torch.ones(3, 2), "scale": torch.ones(1)})
    message = r"(?s)only in the second: scale.*weight: shape \(2, 2\) against \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        tau.apply_to(nn.Linear(2, 2))


def test_plain_modules_are_linearised() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    theta0 = dict(model.named_parameters())
    tau = LinearizedTaskVector(vector={n: torch.randn_like(value) for n, value in theta0.items()})
    x = torch.randn(4, 2).double()
    linear = tau.apply_to(model, scaling_coef=0.5)
    assert isinstance(linear, LinearizedModel)
    call = torch.func.functional_call
    jacobian = torch.func.jacrev(lambda theta: call(model, theta, (x,)))(theta0)
    step = sum(torch.einsum("bo...,...->bo", jacobian[n], v) for n, v in tau.vector.items())
    torch.testing.assert_close(linear(x), model(x) + 0.5 * step)
    standard = linear_to_nonlinear(tau).apply_to(linear, scaling_coef=-0.5)
    assert isinstance(standard, nn.Sequential)
    torch.testing.assert_close(standard(x), model(x))
