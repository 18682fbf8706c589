"""Derivatives propagate through task vectors into state dicts; models refuse to lose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector, TaskVector
from tangent_arithmetic.runtime.errors import UsageError

# PyTorch's own forward mode uses it when it is first called
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
State = dict[str, Tensor]


def model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


M0 = model(0)
TAU, OTHER = (NonLinearTaskVector(M0, model(seed)) for seed in (1, 2))
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
WAYS: dict[str, Callable[[Any], Any]] = {
    "lam * tau": lambda lam: (lam * TAU).apply_to(M0.state_dict()),
    "tau * lam": lambda lam: (TAU * lam).apply_to(M0.state_dict()),
    "tau / lam": lambda lam: (TAU / lam).apply_to(M0.state_dict()),
    "scaling_coef": lambda lam: TAU.apply_to(M0.state_dict(), scaling_coef=lam),
    "positional": lambda lam: TAU.apply_to_nonlinear(M0.state_dict(), lam),
    "of one element": lambda lam: TAU.apply_to(M0.state_dict(), lam.reshape(1)),
    "sum": lambda lam: (lam * TAU + (1 - lam) * OTHER).apply_to(M0.state_dict()),
    "interpolate": lambda lam: TAU.sub_interpolate(OTHER, lam).apply_to(M0.state_dict()),
}


def loss(way: Callable[[Any], State], lam: Tensor) -> Tensor:
    found: Tensor = torch.func.functional_call(M0, way(lam), (X,)).square().sum()
    return found


@pytest.mark.parametrize("name", WAYS)
def test_gradients_of_a_coefficient_are_those_of_finite_differences(name: str) -> None:
    def at(lam: Tensor) -> Tensor:
        return loss(WAYS[name], lam)

    here = torch.tensor(0.7, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        expected = (at(here + step) - at(here - step)) / (2 * step)
    lam = here.clone().requires_grad_()
    (backward,) = torch.autograd.grad(at(lam), lam)
    forward = torch.func.jvp(at, (here,), (torch.ones_like(here),))[1]
    for gradient in (backward, forward, torch.func.grad(at)(here)):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
    several = torch.tensor([0.1, 0.7], dtype=torch.float64)
    each = torch.stack([at(value) for value in several])
    torch.testing.assert_close(torch.func.vmap(at)(several), each)


def test_gradients_of_weights_and_vectors_are_those_of_finite_differences() -> None:
    def at(base: Tensor, step: Tensor) -> Tensor:
        theta = {**M0.state_dict(), "0.bias": base}
        tau = TaskVector(vector={"0.bias": step, "2.weight": TAU.vector["2.weight"]})
        found: Tensor = torch.func.functional_call(M0, tau.apply_to(theta, 0.5), (X,))
        return found

    base, step = (torch.randn(4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(at, (base, step))


LAM = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


def _forward() -> Any:
    with forward_ad.dual_level():
        lam = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        return TAU.apply_to(M0, lam)


@pytest.mark.parametrize(
    "use",
    [
        lambda: (LAM * TAU).apply_to(M0),
        lambda: TAU.apply_to(M0, scaling_coef=LAM),
        lambda: TAU.apply_to_nonlinear(M0, LAM),
        lambda: TAU.apply_to_linear(M0, LAM),
        lambda: (TAU + LAM * OTHER).apply_to_linear(M0),
        lambda: torch.func.grad(lambda lam: TAU.apply_to(M0, lam)(X).sum())(LAM.detach()),
        _forward,
    ],
)
def test_models_refuse_to_lose_derivatives(use: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=r"derivatives.*would be lost.*functional_call"):
        use()


def test_models_accept_tensors_without_derivatives() -> None:
    expected = TAU.apply_to(M0, 0.5)
    moved = [TAU.apply_to(M0, LAM.detach()), TAU.apply_to(M0, torch.tensor([0.5]))]
    with torch.no_grad():
        moved += [TAU.apply_to(M0, LAM), (LAM * TAU).apply_to(M0)]
    for found in moved:
        for name, value in found.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])
            assert not value.requires_grad


@pytest.mark.parametrize("number", [1, 0.1, 1 / 3, -0.7])
def test_a_tensor_of_one_element_equals_its_number(number: float) -> None:
    tau = TaskVector(vector={"w": torch.randn(1000), "s": torch.randn(())})
    theta = {"w": torch.randn(1000), "s": torch.randn(())}
    for factor in (torch.tensor(number), torch.tensor([number]), torch.tensor([[number]])):
        moved, expected = tau.apply_to(theta, factor), tau.apply_to(theta, number)
        scaled = (factor * tau).vector
        for name in theta:
            torch.testing.assert_close(moved[name], expected[name], rtol=1e-6, atol=1e-7)
            assert scaled[name].shape == theta[name].shape
            assert scaled[name].dtype == torch.float32


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.tensor(1j), "half", None, [0.5], 1j])
def test_coefficients_are_one_real_number(wrong: Any) -> None:
    for model_or_state in (M0, M0.state_dict()):
        with pytest.raises(UsageError, match="scaling_coef must be one real number, got"):
            TAU.apply_to(model_or_state, wrong)
    with pytest.raises(UsageError, match="the factor must be one real number, got"):
        TAU * wrong
