"""Coefficients of standard models: derivatives, laws of the passes, and what linear ones reach."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving import standard
from tangent_arithmetic.arithmetic.solving.combining import (
    Settings,
    combine_linear,
    combine_standard,
    reductions,
)
from tangent_arithmetic.arithmetic.solving.merged import Merged, forward
from tangent_arithmetic.arithmetic.solving.minibatches import NetworkImages
from tangent_arithmetic.arithmetic.solving.solver import Objective, minimum
from tangent_arithmetic.arithmetic.solving.standard import (
    Solver,
    cheaper,
    gauss_newton,
    quasi_newton,
    supervised,
)
from tangent_arithmetic.arithmetic.solving.unlabelled import Rule, unlabelled_terms
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.solving.problems import points
from tests.small_suite import random_vector

K, IMAGES = 3, 40
CENTRE = np.full(K, 0.2)


class Curved(ModuleEncoder):
    """A small model, affine in its weights without its hidden layer."""

    kind = "curved"

    def __init__(self, hidden: bool = True) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.Tanh()) if hidden else nn.Identity()
        self.outer = nn.Linear(8 if hidden else 5, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(inputs))
        return out


def model(hidden: bool = True) -> Merged:
    encoder = Curved(hidden)
    vectors = [random_vector(encoder.weights(), 0.9, seed) for seed in range(K)]
    splits = []
    for name in ("XVal", "YVal"):
        head = ClassificationHead(True, 3 * torch.randn(4, 6))
        images = torch.randn(IMAGES, 5)
        theta = {n: v + vectors[0][n] for n, v in encoder.weights().items()}
        labels = head(torch.func.functional_call(encoder, theta, (images,))).argmax(1)
        batches = [(images[i : i + 15], labels[i : i + 15]) for i in range(0, IMAGES, 15)]
        splits.append(Split(name, head, batches))
    return Merged(encoder, vectors, splits)


def loss_at(merged: Merged, a: Tensor) -> Tensor:
    """The mean of the splits' cross-entropies in float64, differentiable in a."""
    total = torch.zeros((), dtype=torch.float64)
    theta = {
        n: v.double() + sum(a[k] * merged.vectors[k][n].double() for k in range(K))
        for n, v in merged.theta0.items()
    }
    for split in merged.splits:
        images, labels = (torch.cat(column) for column in zip(*split.batches, strict=True))
        out = torch.func.functional_call(merged.encoder, theta, (images.double(),))
        assert isinstance(split.head, ClassificationHead)
        weight = split.head.weight.detach().double()
        total = total + F.cross_entropy(F.normalize(out, dim=-1) @ weight.T, labels) / 2
    return total


def test_the_loss_its_gradient_and_the_linearisation_in_float64() -> None:
    merged = model()
    for a in points(3, K):
        point = torch.tensor(a, requires_grad=True)
        loss = loss_at(merged, point)
        (gradient,) = torch.autograd.grad(loss, point)
        value, found = merged.value_and_gradient(a)
        assert value == pytest.approx(float(loss.detach()), abs=1e-5)
        np.testing.assert_allclose(found, gradient, atol=1e-4)
        assert all(p.grad is None for p in merged.encoder.parameters())
        splits, plain = merged.linearise(a), merged.logits(a)
        step = 1e-2 * points(4, K)[-1]
        for split, own in zip(splits, plain, strict=True):
            torch.testing.assert_close(split.logits(0 * a), own.base.double(), rtol=0, atol=1e-4)
        ahead = merged.logits(a + step)
        for split, own, before in zip(splits, ahead, plain, strict=True):
            error, moved = split.logits(step) - own.base, own.base - before.base
            assert float(error.abs().max()) < 0.1 * float(moved.abs().max())
    merged.place(np.zeros(K))
    for name, weight in merged.encoder.weights().items():
        torch.testing.assert_close(weight, merged.theta0[name])
    assert merged.units == 3 * (3 + (1 + 2 * K) + 2)


def test_a_step_that_raises_the_true_objective_is_not_taken() -> None:
    merged, away = model(), np.full(K, -3.0)  # far away, and hardly damped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard, "DAMPING", 1e-9)
        patch.setattr(standard, "TRIES", 30)
        route = gauss_newton(merged, away, 0.0, passes=6)
    values = [float(loss_at(merged, torch.tensor(away))), *(r["objective"] for r in route.history)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(values))
    assert values[-1] < values[0]
    spent = np.diff([1.0, *(record["units"] for record in route.history)])
    assert spent.max() > 1 + 2 * K + 1  # a step was refused, and a shorter one tried


@pytest.mark.parametrize("bounds", [None, (0.0, 0.5)])
def test_every_pass_lowers_the_true_objective(bounds: tuple[float, float] | None) -> None:
    merged = model()
    start = float(loss_at(merged, torch.tensor(CENTRE)))
    route = gauss_newton(merged, CENTRE, 0.01, passes=5, bounds=bounds)
    values = [start, *(record["objective"] for record in route.history)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.9 * start
    end = torch.tensor(route.coefficients)
    ridge = 0.01 * float(((end - 0.2) ** 2).mean())
    assert values[-1] == pytest.approx(float(loss_at(merged, end)) + ridge, abs=1e-4)
    theta = merged.weights(route.coefficients)
    for name, value in merged.encoder.weights().items():  # the model is there
        torch.testing.assert_close(value, theta[name])
    if bounds is not None:
        assert route.coefficients.min() >= 0 and route.coefficients.max() <= 0.5


def test_both_solvers_reach_the_same_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard, "GAIN", 1e-7)
    monkeypatch.setattr(standard, "DAMPING", 100.0)
    merged = model()
    newton = gauss_newton(merged, CENTRE, 1.0, passes=20)
    quasi = quasi_newton(model_again(merged), CENTRE, 1.0, gradients=100)
    ends = [route.history[-1]["objective"] for route in (newton,)]
    ends.append(min(record["objective"] for record in quasi.history))
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    np.testing.assert_allclose(newton.coefficients, quasi.coefficients, atol=0.01)
    assert quasi.units == 3 * len(quasi.history) and newton.solver != quasi.solver


def model_again(merged: Merged) -> Merged:
    """The same model at theta0."""
    merged.place(np.zeros(K))
    return Merged(merged.encoder, merged.vectors, merged.splits)


def test_a_model_that_is_affine_in_its_weights_is_solved_like_a_linear_one() -> None:
    merged = model(hidden=False)
    linear = linearized(merged.encoder)
    splits = reductions(linear, merged.vectors, merged.splits, None)
    settings = Settings(ridge=0.05, solver="gauss-newton", passes=10)
    objective = Objective(supervised(splits), CENTRE, 0.05)
    least, _, _ = minimum(objective, CENTRE)  # of the true objective
    found = combine_standard(merged, 0.2, settings)
    reached = found.facts["passes"][-1]["objective"]
    assert reached == pytest.approx(objective.value(least), abs=2e-4)
    np.testing.assert_allclose(found.coefficients, least, atol=0.05)
    rounds = combine_linear(splits, 0.2, settings)  # with norms held fixed, then updated
    assert reached - 1e-4 < rounds.facts["objective"] < reached + 0.02


def test_the_ridge_is_chosen_on_the_first_pass() -> None:
    found = combine_standard(model(), 0.2, Settings(solver="gauss-newton", passes=2))
    losses = {row["ridge"]: row["loss"] for row in found.facts["cross_validation"]}
    assert losses[found.facts["ridge"]] == min(losses.values())
    stays = gauss_newton(merged := model(), CENTRE, lambda splits: math.inf)
    assert stays.coefficients.tolist() == CENTRE.tolist() and not stays.history
    assert merged.units == 1 + (1 + 2 * K)


@pytest.mark.parametrize("solver", ["gauss-newton", "quasi-newton"])
@pytest.mark.parametrize("rule", ["entropy", "selflabel"])
def test_without_labels_the_box_holds_and_the_objective_falls(rule: Rule, solver: Solver) -> None:
    settings = Settings(rule=rule, solver=solver, passes=2)
    merged = model()
    found = combine_standard(merged, 0.2, settings)
    away = np.abs(found.coefficients - found.uniform).max()
    assert 1e-3 < away <= 0.5 and found.coefficients.min() >= 0
    objectives = [record["objective"] for record in found.facts["passes"]]
    assert min(objectives) == objectives[-1] < objectives[0] or len(objectives) == 1
    merged.place(np.zeros(K))
    wrong = [
        Split(split.name, split.head, [(images, 0 * labels) for images, labels in split.batches])
        for split in merged.splits
    ]
    again = Merged(merged.encoder, merged.vectors, wrong)
    same = combine_standard(again, 0.7, settings)  # neither labels nor their best coefficient count
    np.testing.assert_allclose(same.coefficients, found.coefficients, atol=1e-6)


def test_the_gradient_of_an_objective_without_labels_in_float64() -> None:
    merged, step = model(), 1e-3

    def value(a: np.ndarray) -> float:
        return Objective(unlabelled_terms(merged.logits(a), 1.0), np.zeros(0)).value(np.zeros(0))

    for a in points(3, K):
        found, gradient = merged.value_and_gradient(a, lambda s: unlabelled_terms(s, 1.0))
        assert found == pytest.approx(value(a), abs=1e-5)
        moved = [(value(a + step * e) - value(a - step * e)) / (2 * step) for e in np.eye(K)]
        np.testing.assert_allclose(gradient, moved, atol=2e-3)


def test_the_cheaper_solver_by_forward_passes() -> None:
    assert cheaper(3) == "gauss-newton" and cheaper(4) == "quasi-newton"
    assert cheaper(4, labels=False) == "gauss-newton" and cheaper(5, labels=False) == "quasi-newton"


@pytest.mark.parametrize("solver", ["gauss-newton", "quasi-newton"])
@pytest.mark.parametrize("bounds", [(-2.0, -1.0), (0.0, 0.1)])
def test_bounds_that_leave_out_the_uniform_coefficient_hold(
    bounds: tuple[float, float], solver: Solver
) -> None:
    for rule in (None, "entropy", "selflabel"):
        settings = Settings(bounds=bounds, solver=solver, rule=rule, passes=2)
        found = combine_standard(model(), 0.9, settings).coefficients
        assert found.min() >= bounds[0] and found.max() <= bounds[1], rule


class Normed(ModuleEncoder):
    """A model with a batch norm, whose statistics fine-tuning moves."""

    kind = "normed"

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.relu(self.norm(self.inner(inputs))))
        return out


def normed() -> Merged:
    torch.manual_seed(0)
    encoder = Normed().eval()
    vectors = [random_vector(encoder.weights(), 0.5, seed) for seed in range(K)]
    for tau in vectors:
        tau["norm.running_var"] = tau["norm.running_var"].abs()
    head, images = ClassificationHead(True, 3 * torch.randn(4, 6)), torch.randn(IMAGES, 5)
    return Merged(encoder, vectors, [Split("XVal", head, [(images, torch.arange(IMAGES) % 4)])])


def test_gradients_see_the_statistics_of_batch_norms() -> None:
    merged, step = normed(), 1e-3
    rule = NetworkImages(merged)
    for a in (np.full(K, 0.3), np.array([0.5, 0.1, 0.4])):
        value, gradient = merged.value_and_gradient(a)
        ends = [[merged.value_and_gradient(a + s * e)[0] for s in (step, -step)] for e in np.eye(K)]
        np.testing.assert_allclose(gradient, [(u - v) / (2 * step) for u, v in ends], atol=2e-3)
        merged.place(np.zeros(K))
        point = torch.tensor(a, requires_grad=True)
        logits = rule.logits(point, {0: torch.arange(IMAGES)})[0]
        loss = F.cross_entropy(logits, rule.labels[0])
        assert float(loss.detach()) == pytest.approx(value, abs=1e-5)
        np.testing.assert_allclose(torch.autograd.grad(loss, point)[0], gradient, atol=1e-4)
    assert all(not b.requires_grad for b in merged.encoder.buffers())


def test_passes_that_leave_out_moving_buffers_are_refused() -> None:
    with pytest.raises(UsageError, match="choose quasi-newton"):
        combine_standard(normed(), 0.3, Settings(solver="gauss-newton"))
    found = combine_standard(normed(), 0.3, Settings())
    assert found.facts["solver"] == "quasi-newton"
    objectives = [record["objective"] for record in found.facts["passes"]]
    assert min(objectives) < objectives[0]


def test_in_bf16_the_head_stays_in_float32() -> None:
    merged = model()
    compute = Compute(torch.device("cpu"), "bf16")
    merged.splits = [replace(split, compute=compute) for split in merged.splits]
    (split, _) = merged.logits(CENTRE)
    features = forward(merged.encoder, merged.splits[0].batches[0][0], compute)  # type: ignore[index]
    assert features.dtype == torch.float32
    expected = merged.splits[0].head(features)
    torch.testing.assert_close(split.base[: len(expected)], expected, rtol=0, atol=0)
