"""Solved coefficients: laws, and other solvers' minima."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tangent_arithmetic.arithmetic.solving import solver as module
from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy, entropy
from tangent_arithmetic.arithmetic.solving.newton import newton
from tangent_arithmetic.arithmetic.solving.solver import Objective, minimum, solve
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.solving.problems import DIRECTIONS, logits, points, raw, reduced

CENTRE = np.full(DIRECTIONS, 0.3)


def objective(ridge: float = 0.1, normalises: bool = True) -> Objective:
    terms = [Term(reduced(seed, normalises), cross_entropy, 0.5) for seed in (0, 1)]
    return Objective(terms, CENTRE, ridge)


def by_hand(a: np.ndarray, norms: list[torch.Tensor], ridge: float) -> tuple[float, np.ndarray]:
    """The objective with fixed norms and its gradient, by autograd."""
    point = torch.tensor(a, requires_grad=True)
    total = ridge * ((point - 0.3) ** 2).mean()
    for seed, own in zip((0, 1), norms, strict=True):
        at = logits(seed, point, False) / own[:, None]
        total = total + 0.5 * torch.nn.functional.cross_entropy(at, raw(seed)[2])
    total.backward()
    assert point.grad is not None
    return float(total.detach()), point.grad.numpy()


@pytest.mark.parametrize(
    "bounds", [None, (0.0, 0.5), (np.zeros(DIRECTIONS), np.full(DIRECTIONS, 0.5))]
)
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_no_restart_of_another_solver_finds_a_better_point(ridge: float, bounds: object) -> None:
    own = objective(ridge)
    norms = own.norms(CENTRE)
    found, slope, _ = minimum(own, CENTRE, norms, bounds)  # type: ignore[arg-type]
    assert slope < 1e-6
    value, gradient = by_hand(found, norms, ridge)
    assert value == pytest.approx(own.value(found, norms), abs=1e-6)
    free = np.ones(DIRECTIONS, bool) if bounds is None else (found > 1e-9) & (found < 0.5 - 1e-9)
    assert np.abs(gradient[free]).max() < 1e-5  # of logits in float32
    box = None if bounds is None else [(0.0, 0.5)] * DIRECTIONS
    method = "BFGS" if bounds is None else "SLSQP"
    for start in points(20):
        start = start if bounds is None else np.clip(start, 0, 0.5)
        other = minimize(by_hand, start, (norms, ridge), jac=True, method=method, bounds=box)
        assert other.fun > value - 1e-7
        np.testing.assert_allclose(other.x, found, atol=2e-3)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("normalises", [True, False])
def test_a_solution_is_never_worse_than_its_start(ridge: float, normalises: bool) -> None:
    own = objective(ridge, normalises)
    for start in points(4):
        found = solve(own, start)
        assert found.objective == own.value(found.coefficients) < own.value(start) == found.start
        assert found.gradient is not None and found.gradient < 1e-6
        assert found.rounds == 1 or normalises
        assert (found.difference == 0) or normalises
        stays = solve(own, found.coefficients)  # a fixed point of the rounds
        np.testing.assert_allclose(stays.coefficients, found.coefficients, atol=1e-4)


def test_a_strong_ridge_gives_its_centre_and_bounds_hold() -> None:
    assert solve(objective(math.inf), CENTRE).coefficients.tolist() == CENTRE.tolist()
    np.testing.assert_allclose(solve(objective(1e7), CENTRE).coefficients, CENTRE, atol=1e-5)
    free = solve(objective(0.0), CENTRE).coefficients
    assert free.max() > 0.41
    boxed = solve(objective(0.0), 0 * CENTRE + 9, bounds=(-0.1, 0.4)).coefficients
    assert boxed.min() >= -0.1 and boxed.max() == pytest.approx(0.4)


def test_a_step_that_norms_spoil_is_shortened() -> None:
    """Cross-entropy with the model's own labels falls with the norms held fixed, by scale alone."""
    splits = [replace(reduced(s), labels=reduced(s).logits(CENTRE).argmax(1)) for s in (0, 1)]
    own = Objective([Term(split, cross_entropy, 0.5) for split in splits], CENTRE, 0.0)
    norms = own.norms(CENTRE)
    fixed, _, _ = minimum(replace(own, ridge=1e-3), CENTRE, norms)
    assert own.value(fixed, norms) < own.value(CENTRE) < own.value(fixed)
    found = solve(replace(own, ridge=1e-3), CENTRE)
    assert found.objective < found.start and found.rounds >= 1


def test_many_images_begin_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve(objective(), CENTRE)
    monkeypatch.setattr(module, "SAMPLE", 20)
    sampled = solve(objective(), CENTRE)
    assert sampled.start == whole.start and sampled.rounds == 1
    assert sampled.objective == objective().value(sampled.coefficients)
    assert sampled.objective == pytest.approx(whole.objective, rel=1e-3)


def test_newton_steps_that_overshoot_are_shortened() -> None:
    """Of sqrt(1 + x^2) a full step from x = 2 leads to -x^3, ever farther away."""

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        return float(np.sqrt(1 + x**2).sum()), x / np.sqrt(1 + x**2)

    points = []

    def hessian(x: np.ndarray) -> np.ndarray:
        points.append(x)
        return np.diag((1 + x**2) ** -1.5)

    found, gradient = newton(function, hessian, np.array([2.0, -2.0]), 1e-9)
    np.testing.assert_allclose(found, 0, atol=1e-7)
    assert np.linalg.norm(gradient) < 1e-7 and len(points) < 15


def test_a_direction_that_changes_nothing_keeps_its_coefficient() -> None:
    split = reduced(0)
    still = replace(split, steps=split.steps * torch.tensor([1.0, 0.0, 1.0])[:, None, None])
    found, _, _ = minimum(
        Objective([Term(still, cross_entropy)], CENTRE), CENTRE, [split.norms(CENTRE)]
    )
    assert found[1] == pytest.approx(CENTRE[1], abs=1e-6) and abs(found[0] - CENTRE[0]) > 0.01


def test_other_losses_have_local_minima_of_the_true_objective() -> None:
    own = Objective([Term(reduced(0), entropy)], CENTRE, 0.5)
    found, slope, _ = minimum(own, CENTRE)
    assert slope < 1e-6 and own.value(found) < own.value(CENTRE)
    step = 1e-3 * points(1)[0]
    assert own.value(found) < min(own.value(found + step), own.value(found - step))


def test_weights_that_are_not_finite_are_refused() -> None:
    split = reduced(0)
    split.base[0, 0] = torch.nan
    with pytest.raises(UsageError, match=r"the objective is not finite where the solver starts"):
        solve(Objective([Term(split, cross_entropy)], CENTRE), CENTRE)
