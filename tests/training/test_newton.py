"""Newton's method on a set of images, beside scipy's minimiser on the explicit Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.newton import Loss, NewtonSettings, newton_cg

IMAGES, FEATURES, CLASSES = 24, 5, 3
Batches = list[tuple[Tensor, Tensor]]


def problem(normalize: bool) -> tuple[LinearizedModel, ClassificationHead, Batches]:
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, FEATURES)).double()
    head = ClassificationHead(normalize, 3 * torch.randn(CLASSES, FEATURES).double())
    images, labels = torch.randn(IMAGES, 4).double(), torch.randint(CLASSES, (IMAGES,))
    batches = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, IMAGES, 16)]
    return LinearizedModel(body), head.double().requires_grad_(False), batches


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)


def binary(logits: Tensor, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, CLASSES).to(logits)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def explicit(model: LinearizedModel, batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """f0, the Jacobian (images, features, weights) and the labels."""
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    theta0 = {n: v.clone() for n, v in model.theta0().items()}
    plain = model.standard()

    def features(theta: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(plain, theta, (images,))
        return out

    jacobian = torch.func.jacrev(features)(theta0)
    flat = torch.cat([jacobian[n].flatten(2) for n in theta0], dim=2)
    return features(theta0).detach(), flat.detach(), labels


@pytest.mark.parametrize("loss", [smoothed, binary])
def test_the_optimum_of_the_convex_objective_is_that_of_another_solver(loss: Loss) -> None:
    model, head, batches = problem(normalize=False)
    f0, jacobian, labels = explicit(model, batches)
    ridge = 1e-2

    def objective(point: Tensor) -> Tensor:
        value: Tensor = loss(head(f0 + jacobian @ point), labels).mean() + ridge / 2 * point @ point
        return value

    def of(function: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda tau: np.asarray(function(torch.tensor(tau)).detach())

    least = minimize(
        of(objective),
        np.zeros(jacobian.shape[2]),
        jac=of(torch.func.grad(objective)),
        hess=of(torch.func.jacrev(torch.func.grad(objective))),
        method="trust-exact",
        options={"gtol": 1e-12},
    )
    settings = NewtonSettings(ridge, steps=30, products=100, precision=1e-12)
    steps = newton_cg(model, head, batches, loss, settings)
    found = torch.cat([(p - model.theta0()[n]).flatten() for n, p in model.named_parameters()])
    np.testing.assert_allclose(found.detach().numpy(), least.x, atol=1e-8)
    assert steps[-1].objective == pytest.approx(least.fun, abs=1e-12)
    assert len(steps) < 15 and steps[-1].gradient < 1e-10


def test_a_normalised_head_falls_at_each_step_and_the_features_kept_are_the_models() -> None:
    model, head, batches = problem(normalize=True)
    steps = newton_cg(model, head, batches, smoothed, NewtonSettings(1e-3, steps=12, products=8))
    objectives = [step.objective for step in steps]
    assert objectives == sorted(objectives, reverse=True) and objectives[-1] < objectives[0] - 0.1
    assert steps[-1].gradient < 0.2 * steps[0].gradient
    with torch.no_grad():
        losses = [smoothed(head(model(images)), labels) for images, labels in batches]
    tau = sum(
        float((p.detach() - model.theta0()[n]).square().sum()) for n, p in model.named_parameters()
    )
    assert float(torch.cat(losses).mean()) + 1e-3 / 2 * tau == pytest.approx(objectives[-1])


def test_frozen_parameters_stay_and_an_optimum_is_left_at_once() -> None:
    model, head, batches = problem(normalize=False)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = frozen.clone()
    settings = NewtonSettings(1e-2, steps=30, products=100, precision=1e-11)
    newton_cg(model, head, batches, smoothed, settings)
    torch.testing.assert_close(frozen, before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_no_images_and_features_without_gradients_are_refused() -> None:
    model, head, batches = problem(True)
    with pytest.raises(UsageError, match="expected images to minimise the loss on, got none"):
        newton_cg(model, head, [], smoothed)
    with pytest.raises(UsageError, match=r"depend on parameters that require grad, .* are frozen"):
        newton_cg(model.requires_grad_(False), head, batches, smoothed)


def absolute(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - F.one_hot(labels, CLASSES)).abs().sum(1)


def test_a_loss_without_curvature_needs_a_ridge() -> None:
    model, head, batches = problem(False)
    with pytest.raises(UsageError, match="set a ridge above 0"):
        newton_cg(model, head, batches, absolute)
    steps = newton_cg(model, head, batches, absolute, NewtonSettings(ridge=0.1, steps=2))
    assert steps[-1].objective < steps[0].objective


def test_images_that_change_their_order_are_refused() -> None:
    model, head, batches = problem(True)
    whole = TensorDataset(*(torch.cat(column) for column in zip(*batches, strict=True)))
    for images in (DataLoader(whole, 8, shuffle=True), iter(batches)):
        with pytest.raises(UsageError, match="the same images in the same order"):
            newton_cg(model, head, images, smoothed)
