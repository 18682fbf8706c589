"""Numbers outside the range of a dtype, tensors outside the arithmetic, and invalid states."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.features import Features
from tangent_arithmetic.arithmetic.task_vectors import TaskVector
from tangent_arithmetic.merging import SimpleAverageAlgorithm, TaskArithmeticAlgorithm
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage import statedict

State = dict[str, Tensor]
F8 = torch.float8_e4m3fn
LARGEST = {  # the largest number that rounds to a finite one
    torch.float16: 65519.0,
    torch.bfloat16: 3.39e38,
    torch.float8_e4m3fn: 464.0,
    torch.float8_e5m2: 61439.0,
    torch.float8_e4m3fnuz: 247.0,
    torch.float32: 3.4028234e38,
}


def pair(dtype: torch.dtype, base: float, step: float) -> tuple[State, State]:
    theta0 = {"w": torch.tensor([0.0, base, 1.0], dtype=torch.float32).to(dtype)}
    return theta0, {"w": torch.tensor([0.5, step, -1.0])}


def by_move(theta: State, tau: State, coef: float) -> Tensor:
    return statedict.move(theta, tau, coef)["w"]


def by_move_into(theta: State, tau: State, coef: float) -> Tensor:
    own = {name: value.clone() for name, value in theta.items()}
    statedict.move_into(own, theta, tau, coef)
    return own["w"]


def by_module(theta: State, tau: State, coef: float) -> Any:
    module = nn.Module()
    module.register_buffer("w", theta["w"].clone())
    return TaskVector(vector=tau).apply_to(module, coef).w


def by_merging(theta: State, tau: State, coef: float) -> Any:
    models = {"_pretrained_": theta, "a": {"w": theta["w"].float() + tau["w"]}}
    return TaskArithmeticAlgorithm(coef).run(models)["w"]


def by_copy(theta: State, tau: State, coef: float) -> Tensor:
    own = {"w": torch.zeros_like(theta["w"])}
    statedict.copy_into(own, {"w": theta["w"].float() + coef * tau["w"]}, "weights")
    return own["w"]


ROUTES = [by_move, by_move_into, by_module, by_merging, by_copy]
Route = Callable[[State, State, float], Tensor]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "base", "step", "coef"),
    [
        (torch.float16, -60000.0, -5000.0, 3.0),  # -75000, in torch -inf
        (torch.float16, 65504.0, 16.0, 1.0),  # rounds to inf
        (torch.bfloat16, 3.38e38, 1e36, 2.0),
        (F8, -448.0, -32.0, 1.0),  # in torch saturated at -448
        (torch.float8_e5m2, 57344.0, 8192.0, 1.0),
        (torch.float8_e4m3fnuz, 240.0, 16.0, 1.0),
    ],
)
def test_numbers_out_of_range_are_errors(
    route: Route, dtype: torch.dtype, base: float, step: float, coef: float
) -> None:
    theta, tau = pair(dtype, base, step)
    with pytest.raises(UsageError, match=r"w would be .* at index 1, which torch.* cannot hold"):
        route(theta, tau, coef)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_numbers_are_kept(route: Route, dtype: torch.dtype) -> None:
    theta, tau = pair(dtype, 0.0, LARGEST[dtype])
    found = route(theta, tau, 1.0).float()
    assert found[1] == torch.tensor(torch.finfo(dtype).max) or dtype == torch.bfloat16
    assert found.isfinite().all() and found[1] > 0.9 * LARGEST[dtype]


@pytest.mark.parametrize("route", [by_move, by_move_into, by_module])
@pytest.mark.parametrize(
    ("step", "coef"), [(3e38, 2.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("inf"))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_weights_stay_finite(
    route: Route, step: float, coef: float, dtype: torch.dtype
) -> None:
    theta, tau = pair(dtype, 1.0, step)
    with pytest.raises(UsageError, match=r"w would be .* which is not finite"):
        route(theta, tau, coef)


def by_features(theta: State, tau: State, coef: float) -> Tensor:
    labels = torch.zeros(1, dtype=torch.int64)
    return Features(theta["w"][None], [tau["w"][None]], labels).at([coef])[0]


@pytest.mark.parametrize("route", [by_move, by_move_into, by_module, by_features])
@pytest.mark.parametrize("coef", [1e39, -1e39])
def test_coefficients_beyond_a_dtype_are_errors(route: Route, coef: float) -> None:
    theta, tau = pair(torch.float32, 1.0, 1.0)
    with pytest.raises(UsageError, match=r"coefficient -?1e\+39 is beyond the range of"):
        route(theta, tau, coef)
    wide = {"w": theta["w"].double()}, {"w": tau["w"].double()}
    assert route(*wide, coef)[1] == 1 + coef


@pytest.mark.parametrize("operation", ["subtract", "add", "multiply"])
def test_vectors_of_finite_weights_are_finite(operation: Any) -> None:
    huge = {"w": torch.tensor([1.0, 3e38])}
    other = {"w": torch.tensor([1.0, -3e38 if operation == "subtract" else 3e38])}
    with pytest.raises(UsageError, match=r"w would be .*inf at index 1"):
        TaskVector(other, huge, operation=operation)


def test_sums_and_products_of_finite_vectors_are_finite() -> None:
    tau = TaskVector(vector={"w": torch.tensor([0.0, 2e38])})
    for overflow in (
        lambda: tau + tau,
        lambda: tau - -1 * tau,
        lambda: tau * torch.tensor(2.0),
        lambda: tau / 1e-30,
        lambda: tau**2,
        lambda: (tau - 3 * tau / 2) ** 0.5,
        lambda: float("nan") * tau,
    ):
        with pytest.raises(UsageError, match=r"w would be .* at index [01], which is not finite"):
            overflow()


def test_a_mask_of_infinities_does_not_change() -> None:
    mask = torch.full((2, 2), -torch.inf).triu(1)
    pre = {"mask": mask, "w": torch.zeros(2)}
    ft = {"mask": mask.clone(), "w": torch.ones(2)}
    tau = TaskVector(pre, ft)
    assert torch.equal(tau.vector["mask"], torch.zeros(2, 2))
    assert float(tau.norm()) == pytest.approx(2**0.5, rel=1e-15)
    for moved in (tau.apply_to(pre), SimpleAverageAlgorithm().run({"a": pre, "b": ft})):
        assert torch.equal(moved["mask"], mask)


@pytest.mark.parametrize(
    ("dtype", "step", "coef"),
    [(torch.int64, 1, 0.5), (torch.int8, 100, 2.0), (torch.bool, 1, 1.0), (torch.uint8, -1, 3.0)],
)
def test_integers_move_by_integers(dtype: torch.dtype, step: float, coef: float) -> None:
    theta = {"n": torch.ones(1, dtype=dtype)}
    with pytest.raises(UsageError, match=r"n would be .* which torch\..* cannot hold"):
        statedict.move(theta, {"n": torch.tensor([step])}, coef)
    moved = statedict.move({"n": torch.tensor([2**40 + 1])}, {"n": torch.tensor([2.0])}, 1.0)
    assert moved["n"].item() == 2**40 + 3  # not in float32


def test_copies_that_lose_something_are_refused_before_anything_is_copied() -> None:
    lossy = {torch.int64: 0.5, torch.bool: 2, torch.float32: 1j, torch.uint8: -1}
    for dtype, number in lossy.items():
        value = torch.tensor([number])
        own = {"a": torch.zeros(1), "n": torch.zeros(1, dtype=dtype)}
        with pytest.raises(UsageError, match="cannot hold"):
            statedict.copy_into(own, {"a": torch.ones(1), "n": value}, "weights")
        assert own["a"].item() == 0
    own = {"n": torch.zeros(1, dtype=torch.int64)}
    statedict.copy_into(own, {"n": torch.tensor([3.0])}, "weights")
    assert own["n"].item() == 3


# --- tensors outside the arithmetic

F8_SCALE = torch.float8_e8m0fnu
SKIPPED: dict[str, tuple[Tensor, Tensor]] = {
    "integers": (torch.tensor([1]), torch.tensor([2])),
    "flags": (torch.tensor([True]), torch.tensor([False])),
    "complex": (torch.tensor([1j]), torch.tensor([2j])),
    "scales of blocks": (torch.tensor([1.0]).to(F8_SCALE), torch.tensor([2.0]).to(F8_SCALE)),
    "integer, then real": (torch.tensor([1]), torch.tensor([2.0])),
    "real, then integer": (torch.tensor([1.0]), torch.tensor([2])),
}


@pytest.mark.parametrize("kind", SKIPPED)
@pytest.mark.parametrize("differs", [True, False])
@pytest.mark.parametrize("merging", [True, False])
def test_excluded_tensors_that_differ_are_named(
    kind: str, differs: bool, merging: bool, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"left out: {kind} {merging}"
    before, after = SKIPPED[kind]
    after = after if differs else before.to(after.dtype)
    pre, ft = {name: before, "w": torch.zeros(1)}, {name: after, "w": torch.ones(1)}
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        if merging:
            moved = TaskArithmeticAlgorithm(1.0).run({"_pretrained_": pre, "a": ft})
        else:
            tau = TaskVector(pre, ft)
            assert name not in tau.vector
            moved = tau.apply_to(pre)
        assert statedict.equal(moved[name], before) and moved["w"].item() == 1
    warnings = [each.message for each in caplog.records if name in each.message]
    assert len(warnings) == differs * (2 if merging else 1)  # each merge, and once for vectors
    assert not differs or f"models differ in {name}" in warnings[0].replace("weights", "models")


def test_float8_takes_part_in_the_arithmetic() -> None:
    pre, ft = ({"w": torch.tensor(v).to(F8)} for v in ([1.0, 2.0], [1.5, 2.0]))
    tau = TaskVector(pre, ft)
    assert tau.vector["w"].dtype == torch.float32 and tau.vector["w"].tolist() == [0.5, 0.0]
    assert tau.apply_to(pre)["w"].float().tolist() == [1.5, 2.0]
    assert TaskVector(vector=ft).vector["w"].tolist() == [1.5, 2.0]
    assert statedict.content_hash(pre) != statedict.content_hash(ft)


# --- invalid states

BAD: list[tuple[Any, str]] = [
    ({"w": torch.ones(2), "epoch": 3}, r"epoch: int"),
    ({"w": {"x": torch.ones(1)}}, r"w: dict"),
    ({"w": None}, r"w: NoneType"),
    ({7: torch.ones(2)}, r"7: a name of type int"),
    ({"w": torch.ones(2, 2).to_sparse()}, r"w: a tensor of layout torch.sparse_coo"),
    ({"a\x1b[31m\nb": 1}, r"a\\x1b\[31m\\nb: int"),
]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("bad", "message"), BAD)
def test_an_invalid_state_is_described(bad: Any, message: str) -> None:
    good = {"w": torch.ones(2)}
    for use in (
        lambda: statedict.check_same(good, bad),
        lambda: statedict.check_same(bad, bad),
        lambda: statedict.content_hash(bad),
        lambda: statedict.widened(bad),
        lambda: statedict.combine(bad, bad),
        lambda: statedict.copy_into(good, bad, "weights"),
        lambda: TaskVector(vector=bad),
        lambda: SimpleAverageAlgorithm().run({"a": bad, "b": bad}),
    ):
        with pytest.raises(UsageError, match=rf"must hold dense tensors by name, got\n  {message}"):
            use()


def test_names_are_escaped_in_messages_and_hashed_even_if_they_are_not_unicode() -> None:
    with pytest.raises(UsageError, match=r"only in the second: x\\x1b\[2J"):
        statedict.check_same({}, {"x\x1b[2J": torch.ones(1)})
    assert len(statedict.content_hash({"\udcff": torch.ones(1)})) == 64


def test_numbers_that_are_missing_or_not_real_are_errors() -> None:
    with pytest.raises(UsageError, match="w is on the meta device, which holds no numbers"):
        statedict.content_hash({"w": torch.ones(2, device="meta")})
    with pytest.raises(UsageError, match=r"numbers of type torch\.complex64 take no part"):
        statedict.widened({"w": torch.ones(2, dtype=torch.complex64)})
