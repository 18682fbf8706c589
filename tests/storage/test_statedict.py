from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from tangent_arithmetic.storage import statedict

LAWS = settings(deadline=None, max_examples=40)
COEFS = st.floats(-3, 3, allow_subnormal=False)
NAMES = st.text("abc.", min_size=1, max_size=3)
SHAPES = array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3)

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-9)
State = dict[str, Tensor]


@st.composite
def states(draw: st.DrawFn, count: int) -> list[State]:
    """`count` float64 states of the same names and shapes, 0-d and empty ones among them."""
    shapes = draw(st.dictionaries(NAMES, SHAPES, max_size=3))
    elements = st.floats(-10, 10, allow_subnormal=False)
    return [
        {
            name: torch.from_numpy(draw(arrays(np.float64, shape, elements=elements)).copy())
            for name, shape in shapes.items()
        }
        for _ in range(count)
    ]


def flat(state: State) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([np.zeros(0), *(state[n].numpy().ravel() for n in sorted(state))])


@LAWS
@given(states(3))
def test_addition_is_a_commutative_group(drawn: list[State]) -> None:
    a, b, c = drawn
    close(statedict.add(a, b), statedict.add(b, a), rtol=0, atol=0)
    close(statedict.add(statedict.add(a, b), c), statedict.add(a, statedict.add(b, c)))
    close(statedict.add(statedict.subtract(a, b), b), a)
    assert np.array_equal(flat(statedict.subtract(a, a)), np.zeros_like(flat(a)))
    assert np.array_equal(flat(statedict.add(a, b)), flat(a) + flat(b))


@LAWS
@given(states(2), COEFS, COEFS)
def test_scaling_distributes(drawn: list[State], s: float, t: float) -> None:
    a, b = drawn
    scale, add = statedict.scale, statedict.add
    close(scale(add(a, b), s), add(scale(a, s), scale(b, s)))
    close(scale(a, s + t), add(scale(a, s), scale(a, t)))
    close(scale(scale(a, s), t), scale(a, s * t))
    close(scale(a, 1.0), a, rtol=0, atol=0)


@LAWS
@given(states(2), COEFS, COEFS)
def test_moves_add_up(drawn: list[State], s: float, t: float) -> None:
    theta, tau = drawn
    move = statedict.move
    assert np.allclose(flat(move(theta, tau, s)), flat(theta) + s * flat(tau), 1e-12, 1e-12)
    close(move(move(theta, tau, s), tau, t), move(theta, tau, s + t))
    close(move(theta, statedict.difference(tau, theta)), tau)


@LAWS
@given(states(3), COEFS)
def test_dot_is_symmetric_and_bilinear(drawn: list[State], s: float) -> None:
    a, b, c = drawn

    def dot(x: State, y: State) -> float:
        return float(statedict.dot(x, y))

    assert dot(a, b) == pytest.approx(float(flat(a) @ flat(b)), rel=1e-12, abs=1e-9)
    assert dot(a, b) == dot(b, a)
    combined = dot(statedict.add(a, statedict.scale(b, s)), c)
    assert combined == pytest.approx(dot(a, c) + s * dot(b, c), rel=1e-9, abs=1e-9)
    assert float(statedict.norm(a)) == pytest.approx(float(np.linalg.norm(flat(a))), rel=1e-12)


def test_dot_accumulates_in_float64() -> None:
    a = {"w": torch.tensor([1e8, 1.0])}
    b = {"w": torch.ones(2)}
    assert float(statedict.dot(a, b)) == 1e8 + 1
    assert float(torch.dot(a["w"], b["w"])) == 1e8  # in float32


def test_inputs_do_not_change() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "s": torch.tensor(3.0)}
    b = {"w": torch.tensor([5.0, 6.0]), "s": torch.tensor(7.0)}
    kept_a, kept_b = ({n: v.clone() for n, v in state.items()} for state in (a, b))
    for function in (statedict.add, statedict.subtract, statedict.difference, statedict.move):
        function(a, b)
    statedict.scale(a, 2.0)
    assert statedict.power(a, 2.0)["w"].tolist() == [1.0, 4.0]
    close(a, kept_a, rtol=0, atol=0)
    close(b, kept_b, rtol=0, atol=0)


def test_a_mismatch_lists_all_differences_sorted() -> None:
    a = {"z": torch.zeros(1), "b": torch.zeros(1), "w": torch.zeros(2, 3), "c": torch.zeros(())}
    b = {"y": torch.zeros(1), "a": torch.zeros(1), "w": torch.zeros(3, 2), "c": torch.zeros(1)}
    message = (
        "states do not match:\n"
        "  only in the first: b\n"
        "  only in the first: z\n"
        "  only in the second: a\n"
        "  only in the second: y\n"
        "  c: shape () against (1,)\n"
        "  w: shape (2, 3) against (3, 2)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        statedict.check_same(a, b)


@pytest.mark.parametrize(
    "function", [statedict.add, statedict.subtract, statedict.difference, statedict.dot]
)
def test_states_that_do_not_match_are_not_broadcast(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"w: shape \(2,\) against \(1,\)"):
        function({"w": torch.ones(2)}, {"w": torch.ones(1)})


def test_copy_into_overwrites_in_place_and_keeps_types() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    own, theta = {"w": weight, "n": torch.tensor(1)}, {"n": torch.tensor(3), "w": torch.ones(2)}
    statedict.copy_into(own, theta, "weights")
    assert own["w"] is weight and weight.tolist() == [1.0, 1.0] and own["n"].item() == 3
    assert weight.dtype == torch.bfloat16 and weight.requires_grad and weight.grad_fn is None
    theta["w"].zero_()
    assert weight.tolist() == [1.0, 1.0]


def test_copy_into_copies_nothing_where_something_differs() -> None:
    own = {"a": torch.zeros(2), "w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"^mine do not match:\n  w: shape \(2,\) against \(1,\)$"):
        statedict.copy_into(own, {"a": torch.ones(2), "w": torch.ones(1)}, "mine")
    assert own["a"].tolist() == own["w"].tolist() == [0.0, 0.0]


def test_difference_is_formed_in_float32_of_floating_point_tensors_on_the_first_device() -> None:
    theta, theta0 = torch.tensor(1.0).bfloat16(), torch.tensor(2.0**-9).bfloat16()
    tau = statedict.difference({"w": theta, "n": torch.tensor(3)}, {"w": theta0, "n": theta})
    assert tau.keys() == {"w"} and tau["w"].dtype == torch.float32
    assert float(tau["w"]) == 1 - 2.0**-9
    assert float(theta - theta0) == 1  # in bfloat16
    assert statedict.difference({"w": theta.to("meta")}, {"w": theta0})["w"].is_meta


def test_move_keeps_dtypes_and_tensors_that_the_vector_lacks() -> None:
    theta = {"w": torch.ones(2).bfloat16(), "v": torch.ones(1), "steps": torch.tensor(3)}
    expected = {**theta, "w": torch.tensor([1.5, 1.5]).bfloat16()}
    assert bits(statedict.move(theta, {"w": torch.full((2,), 2.0)}, 0.25)) == bits(expected)


bits = statedict.content_hash  # of names, dtypes, shapes and bytes


@pytest.mark.parametrize("step", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "float64", "bfloat16", "float16"])
def test_move_into_is_move_bit_for_bit(base: str, step: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, steps = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    theta = {"w": weights.to(getattr(torch, base)), "steps": torch.tensor(3), "v": torch.ones(2)}
    tau = {"w": (1e-3 * steps).to(getattr(torch, step))}
    own = {name: value.clone() for name, value in theta.items()}
    kept, before = dict(own), (bits(theta), bits(tau))
    own["v"].fill_(5.0)  # not in tau
    for coef in (1e-3, 0.0, 1 / 3, -0.7, 1.0):  # from theta each time, not from where own is
        statedict.move_into(own, theta, tau, coef)
        assert bits({**own, "v": theta["v"]}) == bits(statedict.move(theta, tau, coef))
    assert all(own[name] is value for name, value in kept.items())
    assert (bits(theta), bits(tau)) == before
    assert own["v"].tolist() == [5.0, 5.0]
    assert bits({"w": own["w"]}) != bits({"w": theta["w"]})


def test_move_into_writes_into_parameters_and_other_layouts() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    own = {"w": weight, "t": torch.zeros(2, 3).T}
    theta = {"w": torch.ones(3, 2), "t": torch.arange(6.0).reshape(3, 2)}
    tau = {name: torch.arange(6.0).reshape(2, 3).T for name in theta}
    memory = {name: value.data_ptr() for name, value in own.items()}
    statedict.move_into(own, theta, tau, 0.5)
    assert bits(own) == bits(statedict.move(theta, tau, 0.5))
    assert {name: value.data_ptr() for name, value in own.items()} == memory
    assert weight.requires_grad and weight.is_leaf and not own["t"].is_contiguous()


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        ({"head.weight": torch.ones(2)}, "only in the second: head.weight"),
        ({"w": torch.ones(1)}, r"w: shape \(2,\) against \(1,\)"),
    ],
)
def test_move_refuses_a_vector_of_other_weights(tau: State, message: str) -> None:
    with pytest.raises(ValueError, match=rf"weights and task vector do not match:\n  {message}"):
        statedict.move({"w": torch.ones(2)}, tau)


def test_content_hash_is_that_of_names_types_shapes_and_bytes() -> None:
    numbers = np.array([[1.5, -2.0]], dtype="<f4")
    expected = hashlib.sha256(
        b"a|torch.int64|()|"
        + np.array(7, dtype="<i8").tobytes()
        + b"b|torch.float32|(1, 2)|"
        + numbers.tobytes()
        + b"c|torch.float16|(0, 3)|"
    ).hexdigest()
    state = {
        "c": torch.zeros(0, 3, dtype=torch.float16),
        "b": torch.nn.Parameter(torch.from_numpy(numbers)),
        "a": torch.tensor(7),
    }
    assert statedict.content_hash(state) == expected


@LAWS
@given(states(1), st.randoms(use_true_random=False))
def test_content_hash_does_not_depend_on_order(drawn: list[State], random: Any) -> None:
    (state,) = drawn
    names = list(state)
    random.shuffle(names)
    shuffled = {name: state[name] for name in names}
    assert statedict.content_hash(shuffled) == statedict.content_hash(state)


def test_content_hash_does_not_depend_on_layout() -> None:
    transposed, expanded = torch.arange(6.0).reshape(2, 3).T, torch.ones(()).expand(4)
    for value in (transposed, expanded, torch.arange(6.0)[::2], torch.arange(2.0)[::2]):
        dense = torch.tensor(value.tolist())
        assert statedict.content_hash({"w": value}) == statedict.content_hash({"w": dense})


@LAWS
@given(states(1), st.data())
def test_content_hash_sees_every_bit(drawn: list[State], data: st.DataObject) -> None:
    state = drawn[0] | {"some": torch.tensor([0.5, -0.0])}
    name = data.draw(st.sampled_from([n for n, v in sorted(state.items()) if v.numel()]))
    raw = bytearray(state[name].numpy().tobytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    changed = torch.frombuffer(raw, dtype=state[name].dtype).reshape(state[name].shape)
    assert statedict.content_hash(state | {name: changed}) != statedict.content_hash(state)


def test_content_hash_depends_on_names_shapes_and_dtypes() -> None:
    zeros = torch.zeros(2, 3)
    states = [{"w": zeros}, {"v": zeros}, {"w": zeros.T}, {"w": zeros.int()}, {}]
    states += [{"w": zeros, "v": torch.zeros(0)}]
    assert len({statedict.content_hash(state) for state in states}) == len(states)
