"""Negation with a coefficient for each direction, under the condition on the control set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.solving.negation import Front, forget
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.tally import measured
from tests.arithmetic.solving.problems import CLASSES, DIRECTIONS, points, reduced

TASK = reduced(0, images=200)


def control_set() -> Reduced:
    """Images that the last direction helps, not the first."""
    own = reduced(1, images=200)
    assert own.root is not None
    root = torch.cat([own.root[:, :, :1], own.root[:, :, 1:].flip(2)], dim=2)
    return replace(own, steps=own.steps.flip(0), root=root)


@pytest.fixture(scope="module")
def front() -> Front:
    return forget(TASK, control_set(), 0.95, weights=[0.3, 3.0])


def test_the_best_point_keeps_the_control_set_and_forgets_more_than_one_coefficient(
    front: Front,
) -> None:
    task, control = TASK, control_set()
    assert front.least == pytest.approx(0.95 * control.accuracy(np.zeros(DIRECTIONS)))
    one, best = front.best(one=True), front.best()
    for point in (one, best):
        assert point.control >= front.least
        assert point.task == task.accuracy(point.coefficients)
        assert point.control == control.accuracy(point.coefficients)
    assert len(set(one.coefficients)) == 1 and one.coefficients[0] <= 0
    assert best.task < one.task - 0.1 and one.task <= task.accuracy(np.zeros(DIRECTIONS))
    assert best.weight is not None


def test_the_front_has_no_point_that_another_one_beats(front: Front) -> None:
    kept = front.frontier()
    assert [p.control for p in kept] == sorted((p.control for p in kept), reverse=True)
    assert len({p.control for p in kept}) == len(kept) > 3
    for point in front.points:
        better = [p for p in kept if p.task <= point.task and p.control >= point.control]
        assert better
    for point in kept:
        assert not any(
            (p.task < point.task and p.control >= point.control)
            or (p.task <= point.task and p.control > point.control)
            for p in front.points
        )


def test_without_a_point_that_qualifies_the_control_set_decides(front: Front) -> None:
    strict = Front(front.points, least=1.1)
    assert strict.best().control == max(p.control for p in front.points)


@pytest.mark.parametrize("bounds", [(-0.4, 0.0), (-2.0, -1.0), (0.0, 1.0), (-7.5, -6.5)])
def test_bounds_hold_at_every_point(bounds: tuple[float, float]) -> None:
    found = forget(reduced(0), reduced(1), 0.95, weights=[0.3], bounds=bounds)
    assert any(p.weight is not None for p in found.points)
    for point in found.points:
        assert point.coefficients.min() >= bounds[0] and point.coefficients.max() <= bounds[1]


def test_rounding_does_not_lose_a_control_set_that_is_just_kept() -> None:
    steps = torch.zeros(1, 100, 2)
    steps[0, :8, 1] = 1.0  # the direction turns 8 of 80 right answers
    base = torch.tensor([[0.5, 0.0]]).repeat(100, 1)
    labels = (torch.arange(100) >= 80).long()
    control = Reduced("CVal", base, steps, None, labels)
    assert 0.9 * control.accuracy(np.zeros(1)) > control.accuracy(np.ones(1)) == 0.72
    task = Reduced("XVal", base, steps, None, 0 * labels)
    assert forget(task, control, 0.9, weights=[], uniform=[-1.0]).best().task == 0.92


def test_the_main_metric_counts_where_images_have_several_labels() -> None:
    own = reduced(0)
    labels = torch.nn.functional.one_hot(own.labels, CLASSES).to(torch.uint8)
    labels[::2, 0] = 1
    several = replace(own, labels=labels)
    for a in points(3):
        expected = measured(own.logits(a), labels)["map"]
        assert several.accuracy(a) == pytest.approx(expected)
    assert len({several.accuracy(a) for a in points(3)}) == 3
