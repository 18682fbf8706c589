"""Fronts of tasks, against another solver and what an optimum implies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.fronts import SMALLEST_RIDGE, Front, front, simplex
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.runtime.errors import UsageError

TASKS, DIRECTIONS, IMAGES, CLASSES, WIDTH = ("A", "B", "C"), 4, 30, 5, 8
START = np.full(DIRECTIONS, 0.3)


def splits_of(normalises: bool, tasks: int = 3, end: str = "Val") -> list[Reduced]:
    """Random features under random heads, a split a task; some images follow the direction."""
    found = []
    for task in TASKS[:tasks]:
        generator = torch.Generator().manual_seed(ord(task) + len(end))
        wide = torch.randn(1 + DIRECTIONS, IMAGES, WIDTH, generator=generator)
        weight = torch.randn(CLASSES, WIDTH, generator=generator)
        base, *steps = wide @ weight.T
        labels = (base + 0.5 * steps[ord(task) - ord("A")]).argmax(dim=1)
        labels[::3] = torch.randint(CLASSES, (len(labels[::3]),), generator=generator)
        root = wide.permute(1, 2, 0) if normalises else None
        found.append(Reduced(f"{task}{end}", base, torch.stack(steps), root, labels))
    return found


def objective(splits: list[Reduced], weights: np.ndarray, a: Tensor) -> Tensor:
    """The weighted sum of cross-entropies with the ridge, written out."""
    total = SMALLEST_RIDGE * (a - torch.from_numpy(START)).square().mean()
    for split, weight in zip(splits, weights, strict=True):
        logits = split.base.double() + torch.einsum("k,knc->nc", a, split.steps.double())
        if split.root is not None:
            point = torch.cat([torch.ones(1, dtype=torch.float64), a])
            logits = logits / (split.root.double() @ point).norm(dim=1)[:, None]
        total = total + float(weight) * F.cross_entropy(logits, split.labels)
    return total


@pytest.mark.parametrize("normalises", [False, True])
def test_points_are_minima_and_no_other_solver_finds_better_ones(normalises: bool) -> None:
    splits, weights = splits_of(normalises), simplex(3, 2)
    found = front(splits, weights, START)
    assert found.tasks == TASKS and found.coefficients.shape == (6, DIRECTIONS)
    for own, point in zip(weights, found.coefficients, strict=True):
        a = torch.from_numpy(point).requires_grad_()
        value = objective(splits, own, a)
        (gradient,) = torch.autograd.grad(value, a)
        assert float(gradient.norm()) < 1e-6
        rng = np.random.default_rng(0)
        starts = [START, point + 0.5 * rng.normal(size=DIRECTIONS)]
        others = [
            minimize(
                lambda x, own=own: float(objective(splits, own, torch.from_numpy(x))),
                start,
                method="Powell",
                options={"xtol": 1e-6, "ftol": 1e-9},
            ).fun
            for start in starts
        ]
        assert value.item() <= min(others) + 1e-7


@pytest.mark.parametrize("normalises", [False, True])
def test_each_point_is_the_best_for_its_own_weights(normalises: bool) -> None:
    found = front(splits_of(normalises), simplex(3, 3), START)
    scores = found.weights @ found.losses.T  # (weights, points)
    own = np.diagonal(scores)[:, None]
    assert (own <= scores + 1e-4).all()
    assert (scores - own).max() > 0.05  # weights matter


def test_losses_and_accuracies_are_those_of_the_model() -> None:
    splits, report = splits_of(True, 2), splits_of(True, 2, "")
    found = front(splits, simplex(2, 4), START, report)
    for i, point in enumerate(found.coefficients):
        for t, (split, other) in enumerate(zip(splits, report, strict=True)):
            loss = F.cross_entropy(split.logits(point), split.labels)
            assert found.losses[i, t] == pytest.approx(float(loss))
            hits = other.logits(point).argmax(dim=1) == other.labels
            assert found.accuracies[i, t] == pytest.approx(float(hits.double().mean()))
    first = found.records()[0]
    assert first["weight A"] == 1 and first["weight B"] == 0
    assert first["accuracy B"] == found.accuracies[0, 1]
    losses = found.losses
    assert (np.diff(losses[:, 0]) > -1e-6).all() and (np.diff(losses[:, 1]) < 1e-6).all()


@pytest.mark.parametrize(("tasks", "divisions"), [(1, 3), (2, 10), (3, 4), (8, 2)])
def test_the_simplex(tasks: int, divisions: int) -> None:
    weights = simplex(tasks, divisions)
    assert weights.shape == (math.comb(divisions + tasks - 1, tasks - 1), tasks)
    assert len(np.unique(weights, axis=0)) == len(weights)
    assert (weights >= 0).all() and np.allclose(weights.sum(axis=1), 1)
    np.testing.assert_allclose(weights * divisions, np.round(weights * divisions))
    assert weights[0, 0] == weights[-1, -1] == 1


def test_points_that_others_beat() -> None:
    accuracies = np.array([[0.9, 0.1], [0.8, 0.5], [0.8, 0.4], [0.1, 0.9], [0.8, 0.5], [0.1, 0.8]])
    none = np.zeros((6, 2))
    assert Front(("A", "B"), none, none, none, accuracies).efficient() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.array([[0.5, 0.6]]), "not negative and sum to 1"),
        (np.array([[1.5, -0.5]]), "not negative and sum to 1"),
        (np.ones((1, 1)), "a weight for each of 2 tasks"),
    ],
)
def test_weights_lie_on_the_simplex(weights: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        front(splits_of(False, 2), weights, START)


def test_a_simplex_needs_a_task_and_a_division() -> None:
    with pytest.raises(UsageError, match="expected at least one task and division, got 0 and 2"):
        simplex(0, 2)
