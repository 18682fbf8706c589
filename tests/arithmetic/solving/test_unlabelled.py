"""Coefficients without labels: what guards promise, and the published rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.solving.combining import Settings, combine_linear
from tangent_arithmetic.arithmetic.solving.losses import entropy, imbalance
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.solver import Objective
from tangent_arithmetic.arithmetic.solving.unlabelled import (
    RULES,
    Guards,
    Rule,
    adamerging,
    self_labels,
    uniform_without_labels,
    unlabelled_terms,
    without_labels,
)
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.solving.problems import DIRECTIONS, IMAGES, logits, points, reduced

CENTRE = np.full(DIRECTIONS, 0.3)


def splits() -> list[Reduced]:
    return [reduced(seed) for seed in (0, 1)]


def shuffled() -> list[Reduced]:
    """The same images with other labels."""
    return [replace(split, labels=split.labels.flip(0)) for split in splits()]


@pytest.mark.parametrize("rule", RULES)
def test_a_solution_uses_no_labels_and_stays_in_its_box(rule: Rule) -> None:
    free = Guards(radius=5.0, ridge=0.0, balance=0.0)
    assert np.abs(without_labels(rule, splits(), CENTRE, free).coefficients - 0.3).max() > 0.1
    for radius, ridge in ((0.08, 0.0), (0.05, 0.1), (0.5, 1e7)):
        guards = Guards(radius=radius, ridge=ridge)
        found = without_labels(rule, splits(), CENTRE, guards)
        assert found.objective <= found.start
        distance = np.abs(found.coefficients - 0.3)
        assert distance.max() <= radius + 1e-12 and found.coefficients.min() >= 0
        assert ridge < 1e7 or distance.max() < 1e-5
        other = without_labels(rule, shuffled(), CENTRE, guards)
        assert other.coefficients.tolist() == found.coefficients.tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bounds", [(0.0, 0.05), (-0.2, -0.1), (2.0, 3.0)])
def test_bounds_of_a_user_hold_too(rule: Rule, bounds: tuple[float, float]) -> None:
    settings = Settings(rule=rule, bounds=bounds)
    found = combine_linear([reduced(0), reduced(1)], 0.2, settings).coefficients
    assert found.min() >= bounds[0] and found.max() <= bounds[1]


@pytest.mark.parametrize("rule", RULES)
def test_several_labels_an_image_are_refused(rule: Rule) -> None:
    own = reduced(0)
    labels = torch.nn.functional.one_hot(own.labels).to(torch.uint8)
    with pytest.raises(UsageError, match="several labels"):
        combine_linear([replace(own, labels=labels)], 0.2, Settings(rule=rule))


def test_the_balance_keeps_predictions_from_one_class() -> None:
    """Images whose direction raises one class for all of them, the collapse of bare entropy."""
    split = reduced(0)
    split.steps[0] = 0
    split.steps[0, :, 2] = 30
    split = replace(split, root=None)
    shares = {}
    for balance in (0.0, 3.0):
        guards = Guards(radius=5.0, ridge=0.0, balance=balance)
        a = without_labels("entropy", [split], CENTRE, guards).coefficients
        predicted = split.logits(a).argmax(dim=1)
        shares[balance] = float(torch.bincount(predicted, minlength=4).max()) / IMAGES
    assert shares[0.0] == 1 and shares[3.0] < 0.6


def test_terms_and_the_uniform_point() -> None:
    for a in points(2):
        shares = torch.full((IMAGES,), 1 / IMAGES, dtype=torch.float64)
        expected = 0.0
        for seed in (0, 1):
            at = logits(seed, torch.tensor(a))
            both = entropy(at, at, shares) + 2 * imbalance()(at, at, shares)
            expected += float(both) / 2
        value = Objective(unlabelled_terms(splits(), 2.0), CENTRE).value(a)
        assert value == pytest.approx(expected, abs=1e-6)
    grid = [0.0, 0.2, 0.4, 0.6]
    values = [Objective(unlabelled_terms(splits(), 1.0), CENTRE).value(np.full(3, c)) for c in grid]
    assert uniform_without_labels(splits(), grid) == grid[int(np.argmin(values))]


def test_self_labels_are_predictions_balanced_over_classes() -> None:
    split, a = reduced(0), points(1)[0]
    p = logits(0, torch.tensor(a)).softmax(dim=1)
    term = self_labels(split, a)
    assert term.reduced.labels.tolist() == p.argmax(1).tolist()
    assert term.weights is not None and float(term.weights.sum()) == pytest.approx(1)
    best = p.max(dim=1).values
    for label in term.reduced.labels.unique():
        own = term.reduced.labels == label
        expected = best[own] / best[own].sum() / len(term.reduced.labels.unique())
        np.testing.assert_allclose(term.weights[own], expected, rtol=1e-5)
    sure = self_labels(split, a, confidence=0.9)
    assert sure.weights is not None
    assert ((sure.weights > 0) == (best >= 0.9)).all() and 0 < int((best >= 0.9).sum()) < IMAGES


def test_the_published_rule_against_adam_by_hand() -> None:
    """On all images a step is the same whatever the batches' order."""
    rate, own = 0.01, splits()
    a, m, v = np.full(DIRECTIONS, 0.3), np.zeros(DIRECTIONS), np.zeros(DIRECTIONS)
    shares = torch.full((IMAGES,), 1 / IMAGES, dtype=torch.float64)
    for step in range(1, 6):
        point = torch.tensor(a, requires_grad=True)
        loss = sum(entropy(logits(seed, point), point, shares) for seed in (0, 1))
        (gradient,) = torch.autograd.grad(torch.as_tensor(loss), point)
        m, v = 0.9 * m + 0.1 * gradient.numpy(), 0.999 * v + 0.001 * gradient.numpy() ** 2
        a = a - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    found = adamerging(own, steps=5, rate=rate, batch=IMAGES)
    np.testing.assert_allclose(found, a, atol=1e-6)
    small = adamerging(own, steps=20, batch=8, seed=3)
    assert small.tolist() == adamerging(shuffled(), steps=20, batch=8, seed=3).tolist()
    assert adamerging(own, start=2.0, steps=1).max() == 1  # clipped
