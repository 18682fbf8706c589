"""Task vectors: what they are formed of, where they start, how they are kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.task_vectors import (
    LinearizedTaskVector,
    NonLinearTaskVector,
    TaskVector,
    interpolate,
    linear_to_nonlinear,
    nonlinear_to_linear,
)
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import content_hash

State = dict[str, Tensor]


def state(seed: int, dtype: torch.dtype = torch.float64) -> State:
    generator = torch.Generator().manual_seed(seed)
    found = {
        "w": torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype),
        "b": torch.randn(4, generator=generator, dtype=torch.float64).to(dtype),
    }
    return {**found, "steps": torch.tensor(seed)}


@pytest.mark.parametrize(
    ("operation", "form"),
    [
        ("subtract", lambda ft, pre: ft - pre),
        ("add", lambda ft, pre: ft + pre),
        ("multiply", lambda ft, pre: ft * pre),
        ("divide", lambda ft, pre: ft / pre),
    ],
)
def test_operations_form_the_vector_by_element(operation: str, form: object) -> None:
    pre, ft = state(0), state(1)
    vector = TaskVector(pre, ft, operation=operation).vector  # type: ignore[arg-type]
    assert vector.keys() == {"w", "b"}
    for name, value in vector.items():
        assert torch.equal(value, form(ft[name], pre[name]))  # type: ignore[operator]


def test_quotients_that_are_not_finite_are_zero() -> None:
    pre = {"w": torch.tensor([0.0, 0.0, 1e-45, 2.0])}
    ft = {"w": torch.tensor([1.0, 0.0, 1e30, 3.0])}
    quotient = TaskVector(pre, ft, operation="divide").vector["w"]
    assert quotient.tolist() == [0.0, 0.0, 0.0, 1.5]


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(UsageError, match="unknown operation 'substract'; choose from subtract"):
        TaskVector(state(0), state(1), operation="substract")  # type: ignore[arg-type]


def test_dicts_give_dicts_and_are_left_alone() -> None:
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


def test_modules_give_new_modules() -> None:
    pre = nn.Linear(3, 2)
    ft = copy.deepcopy(pre)
    with torch.no_grad():
        ft.weight += 1
    before = content_hash(pre.state_dict())
    moved = NonLinearTaskVector(pre, ft).apply_to(pre, scaling_coef=2.0)
    assert isinstance(moved, nn.Linear) and moved is not pre
    torch.testing.assert_close(moved.weight, pre.weight + 2)
    assert content_hash(pre.state_dict()) == before


def test_dicts_are_not_linearised() -> None:
    with pytest.raises(TypeError, match="which has no forward pass to linearise"):
        TaskVector(state(0), state(1)).apply_to_linear(state(0))


def test_vectors_of_another_start_do_not_mix_unless_asked() -> None:
    one, other = TaskVector(state(0), state(1)), TaskVector(state(2), state(3))
    for combine in (lambda: one + other, lambda: one - other, lambda: sum([one, other])):
        with pytest.raises(UsageError, match="of different pre-trained weights"):
            combine()
    allowed = TaskVector(state(2), state(3), allow_base_mismatch=True)
    both = one + allowed
    assert both.base_hash is None and both.allow_base_mismatch
    torch.testing.assert_close(both.vector["w"], one.vector["w"] + other.vector["w"])
    assert (one + one).base_hash == one.base_hash == content_hash(state(0))
    assert (one + TaskVector(vector=other.vector)).base_hash == one.base_hash  # not known


def test_casts_keep_the_start() -> None:
    one, other = NonLinearTaskVector(state(0), state(1)), NonLinearTaskVector(state(2), state(3))
    linear = nonlinear_to_linear(one)
    assert linear.base_hash == linear_to_nonlinear(linear).base_hash == one.base_hash
    with pytest.raises(UsageError, match="of different pre-trained weights"):
        linear + other


def test_analogies_and_interpolation() -> None:
    a, b, c = (TaskVector(state(0), state(i)) for i in (1, 2, 3))
    analogy = c + b - a
    for name in ("w", "b"):
        expected = state(3)[name] + state(2)[name] - state(1)[name] - state(0)[name]
        torch.testing.assert_close(analogy.vector[name], expected)
        torch.testing.assert_close(
            interpolate(a, b, 0.25).vector[name], 0.75 * a.vector[name] + 0.25 * b.vector[name]
        )
    torch.testing.assert_close(a.sub_interpolate(b).vector["w"], interpolate(b, a).vector["w"])
    u, v = (torch.cat([t.vector["w"].flatten(), t.vector["b"]]) for t in (a, b))
    cosine = torch.nn.functional.cosine_similarity(u, v, dim=0)
    torch.testing.assert_close(a.cosine_similarity(b), cosine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_are_summed_in_float32(dtype: torch.dtype) -> None:
    parts = [{"w": torch.full((4,), 1.0, dtype=dtype)}] + [
        {"w": torch.full((4,), 2.0**-12, dtype=dtype)} for _ in range(4096)
    ]
    total = sum((TaskVector(vector=part) for part in parts[1:]), TaskVector(vector=parts[0]))
    assert total.vector["w"].dtype == torch.float32
    assert total.vector["w"].tolist() == [2.0] * 4


@pytest.mark.parametrize("kind", [TaskVector, NonLinearTaskVector, LinearizedTaskVector])
def test_saved_vectors_come_back(kind: type[TaskVector], tmp_path: Path) -> None:
    tau = kind(state(0), state(1))
    tau.save(tmp_path / "tau.pt")
    found = kind.load(tmp_path / "tau.pt")
    assert type(found) is kind and (tmp_path / "tau.safetensors").is_file()
    assert content_hash(found.vector) == content_hash(tau.vector)
    assert found.base_hash == tau.base_hash


def test_a_checkpoint_is_no_vector(tmp_path: Path) -> None:
    from tangent_arithmetic.storage.checkpoints import save_tensors

    save_tensors(tmp_path / "head.safetensors", {"w": torch.ones(2)}, "head")
    with pytest.raises(UsageError, match="holds a head, expected a task_vector"):
        TaskVector.load(tmp_path / "head.safetensors")


def test_buffers_are_dropped_for_linear_models() -> None:
    pre = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    pre.register_buffer("shift", torch.zeros(2))
    ft = copy.deepcopy(pre)
    ft(torch.randn(8, 2))
    tau = NonLinearTaskVector(pre, ft)
    assert tau.buffers == {"1.running_mean", "1.running_var", "shift"}
    assert nonlinear_to_linear(tau).vector.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    by_name = NonLinearTaskVector(dict(pre.state_dict()), dict(ft.state_dict()))  # not known
    assert nonlinear_to_linear(by_name).vector.keys() == tau.vector.keys() - {
        "1.running_mean",
        "1.running_var",
    }
