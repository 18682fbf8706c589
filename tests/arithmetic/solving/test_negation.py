"""Negation with a coefficient for each direction, under the condition on the control set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.solving.negation import Front, forget
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tests.arithmetic.solving.problems import DIRECTIONS, reduced

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
    assert front.least == 0.95 * control.accuracy(np.zeros(DIRECTIONS))
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


def test_bounds_hold_before_solutions_are_scaled() -> None:
    found = forget(reduced(0), reduced(1), 0.95, weights=[0.3], factors=[1.0], bounds=(-0.4, 0.0))
    solved = [p.coefficients for p in found.points if p.weight is not None]
    assert all(a.min() >= -0.4 and a.max() <= 0 for a in solved) and len(solved) == 1
