"""Several coefficients with gradients: one a task and layer, of standard and linear models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tests.arithmetic.tiny import Convolution
from tests.small_suite import random_vector

# PyTorch's own forward mode uses it when it is first called
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 0, 1])


def model(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


M0 = model(0)
TANGENT = LinearizedModel(M0)
TASKS = [LinearizedTaskVector(M0, model(seed)) for seed in (1, 2)]
LAYERS = [
    LinearizedTaskVector(
        vector={n: v if n.startswith(layer) else torch.zeros_like(v) for n, v in tau.vector.items()}
    )
    for tau in TASKS
    for layer in ("0.", "2.")
]


def combined(coefs: Tensor, vectors: list[LinearizedTaskVector]) -> LinearizedTaskVector:
    """The sum of coefs[k] * vectors[k]."""
    first, *others = (a * tau for a, tau in zip(coefs, vectors, strict=True))
    return sum(others, start=first)


def standard_loss(tau: LinearizedTaskVector) -> Tensor:
    theta = tau.apply_to(dict(M0.state_dict()))
    return F.cross_entropy(torch.func.functional_call(M0, theta, (X,)), Y)


def linear_loss(tau: LinearizedTaskVector) -> Tensor:
    theta = tau.apply_to(TANGENT.theta())
    return F.cross_entropy(torch.func.functional_call(TANGENT, theta, (X,)), Y)


@pytest.mark.parametrize("vectors", [TASKS, LAYERS])
@pytest.mark.parametrize("loss", [standard_loss, linear_loss])
def test_gradients_of_all_coefficients_are_those_of_finite_differences(
    loss: Callable[[LinearizedTaskVector], Tensor], vectors: list[LinearizedTaskVector]
) -> None:
    coefs = torch.linspace(-0.4, 0.9, len(vectors), dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(loss(combined(coefs, vectors)), coefs)
    step = 1e-6
    with torch.no_grad():
        moves = step * torch.eye(len(vectors), dtype=torch.float64)
        expected = torch.stack([
            loss(combined(coefs + move, vectors)) - loss(combined(coefs - move, vectors))
            for move in moves
        ]) / (2 * step)  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert float(found.abs().min()) > 1e-4


def test_values_are_those_of_the_models_that_are_moved() -> None:
    coefs = torch.tensor([0.3, -0.8], dtype=torch.float64)
    tau = combined(coefs, TASKS)
    theta = tau.apply_to(dict(M0.state_dict()))
    assert isinstance(theta, dict)
    expected = tau.apply_to_nonlinear(M0)(X)
    torch.testing.assert_close(torch.func.functional_call(M0, theta, (X,)), expected)
    moved = torch.func.functional_call(TANGENT, tau.apply_to(TANGENT.theta()), (X,))
    torch.testing.assert_close(moved, tau.apply_to(M0)(X))
    assert not torch.allclose(moved, expected, rtol=0.01)


def test_coefficients_are_learned_by_gradient_steps() -> None:
    coefs = torch.zeros(len(LAYERS), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([coefs], lr=0.1)
    losses = []
    for _ in range(20):
        loss = standard_loss(combined(coefs, LAYERS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(parameter.grad is None for parameter in M0.parameters())


@pytest.mark.parametrize("kind", ["standard", "linear model", "linear encoder"])
def test_the_way_out_of_the_refusal_works(kind: str) -> None:
    images = torch.randn(2, 3, 6, 6)
    encoder = Convolution().eval()
    vector = random_vector({n: p.detach() for n, p in encoder.named_parameters()})
    tau = LinearizedTaskVector(vector=vector)
    coef = torch.tensor(0.5, requires_grad=True)
    own: Any = linearized(encoder)
    models = {"standard": encoder, "linear model": own.model, "linear encoder": own}
    apply = tau.apply_to_nonlinear if kind == "standard" else tau.apply_to_linear
    with pytest.raises(UsageError, match=r"derivatives.*would be lost") as refused:
        apply(models[kind], scaling_coef=coef)
    names = {"tau": tau, "coef": coef, "torch": torch, "inputs": (images,)}
    names |= {"model": models[kind], "encoder": models[kind]}
    text = str(refused.value)
    theta = re.search(r"theta = (tau\.apply_to\(.*?, coef\)), and", text)
    call = re.search(r"call (torch\.func\.functional_call\(.*?, theta, inputs\))", text)
    assert theta is not None and call is not None
    names["theta"] = eval(theta[1], names)
    features = eval(call[1], names)
    torch.testing.assert_close(features, apply(models[kind], scaling_coef=0.5)(images))
    (gradient,) = torch.autograd.grad(features.sum(), coef)
    assert float(gradient.abs()) > 0
