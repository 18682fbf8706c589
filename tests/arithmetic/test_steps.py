"""Step functions with known plateaus."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.steps import Plateau, Steps, joint, weighted
from tangent_arithmetic.runtime.errors import UsageError

INF = math.inf


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


STEPS = Steps(tensor(0, 1, 2, 2 + 1e-9, 4, 5), tensor(0.1, 0.5, 0.3, 0.9, 0.3, 0.5, 0.2))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-INF, INF, Plateau(0, 1, 0.5)),  # of two equally wide ones the lower; 0.9 is too narrow
        (0.3, INF, Plateau(4, 5, 0.5)),  # now the other one is wider
        (1, 3, Plateau(1, 2, 0.3)),  # better but narrow, the next piece parts this one
        (6, INF, Plateau(6, INF, 0.2)),
        (-INF, -1, Plateau(-INF, -1, 0.1)),
    ],
)
def test_the_best_plateau(low: float, high: float, expected: Plateau) -> None:
    found = STEPS.best(low, high)
    assert found == expected
    assert low <= found.coefficient <= high and found.low <= found.coefficient <= found.high
    assert STEPS.at([found.coefficient]).tolist() == [found.value]


def test_a_range_without_width_has_no_best() -> None:
    with pytest.raises(UsageError, match="expected a range wider than 1e-06, got 1 to 1"):
        STEPS.best(1, 1)


@pytest.mark.parametrize(
    ("coef", "least", "expected"),
    [
        (0.5, 0.4, (0, 1)),
        (0.5, 0.3, (0, 5)),
        (2, 0.8, (2, 2 + 1e-9)),
        (3, 0.1, (-INF, INF)),
        (3, 0.4, None),
        (1, 0.4, None),
    ],
)
def test_the_range_about_a_coefficient(
    coef: float, least: float, expected: tuple[float, float] | None
) -> None:
    assert STEPS.around(coef, least) == expected


@pytest.mark.parametrize(
    ("edges", "values", "expected"),
    [
        ((-1e17,), (1, 0), Plateau(-INF, -1e17, 1)),
        ((1e17,), (0, 1), Plateau(1e17, INF, 1)),
        ((-1e17, 1e17), (0, 1, 0), Plateau(-1e17, 1e17, 1)),
        ((1e17, 1e17 + 64, 3e17), (0, 1, 0.5, 0), Plateau(1e17 + 64, 3e17, 0.5)),  # too narrow
        ((), (1,), Plateau(-INF, INF, 1)),
    ],
)
def test_plateaus_far_from_zero(
    edges: tuple[float, ...], values: tuple[float, ...], expected: Plateau
) -> None:
    steps = Steps(tensor(*edges), tensor(*values))
    found = steps.best()
    assert found == expected
    at = float(torch.tensor(found.coefficient, dtype=torch.float32))  # as features are moved
    assert steps.at([found.coefficient, at]).tolist() == [found.value] * 2
    near = steps.around(found.coefficient, found.value)
    assert near is not None and near[0] <= expected.low and near[1] == expected.high


def test_the_middle_of_neighbouring_numbers_is_inside() -> None:
    low = 1 + 2**-52
    assert Plateau(low, math.nextafter(low, 2), 1.0).coefficient == low
    assert Plateau(1e308, 1.5e308, 1.0).coefficient == 1.25e308


@pytest.mark.parametrize("first", [(0.1, 0.3), (0.3, 0.1)])
def test_rounding_does_not_part_a_plateau(first: tuple[float, float]) -> None:
    parts = [first, (0.2, 0.2), first[::-1]]
    total = weighted([Steps(tensor(0, 0.001, 1), tensor(0, *p, 0)) for p in parts], [1 / 3] * 3)
    assert total.values[1] != total.values[2]
    found = total.best()
    assert (found.low, found.high, found.value) == (0, 1, pytest.approx(0.2))
    kept = total.least(Steps(tensor(), tensor(1)), 0.5, 0.0, 1.0)
    assert kept is not None and (kept.low, kept.high) == (0, 1)


def test_sums_of_step_functions() -> None:
    one, two = Steps(tensor(0, 1), tensor(1, 2, 3)), Steps(tensor(0.5, 1), tensor(5, 7, 11))
    for each, same in zip((one, two), joint([one, two]), strict=True):
        assert same.edges.tolist() == [0, 0.5, 1]
        points = torch.linspace(-1, 2, 31)
        assert torch.equal(same.at(points), each.at(points))
    total = weighted([one, two], [0.5, 2])
    assert total.at([-1, 0, 0.5, 1]).tolist() == [10.5, 11, 15, 23.5]


def test_ends_for_json() -> None:
    assert Plateau(-INF, 2.0, 1.0).ends() == [None, 2.0]
    ranges = [(-INF, -3.0), (-INF, 7.0), (7.0, INF), (-3.0, INF), (-INF, INF), (2.0, 4.0)]
    points = [Plateau(low, high, 1.0).coefficient for low, high in ranges]
    assert points == [-4.0, 0.0, 8.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("threshold", "low", "expected"),
    [
        (0.95, 0.0, Plateau(1, 2, 0.2)),  # lower still where the control is not kept
        (0.5, 0.0, Plateau(3, 4, 0.1)),  # of equal ones that with the larger control
        (0.5, 4.5, Plateau(5, INF, 0.1)),
        (1.1, 0.0, None),
        (1.0, 0.0, Plateau(0, 1, 0.7)),
        (1.0, -INF, Plateau(-INF, 1, 0.7)),
    ],
)
def test_the_least_where_a_control_is_kept(
    threshold: float, low: float, expected: Plateau | None
) -> None:
    target = Steps(tensor(1, 3), tensor(0.7, 0.2, 0.1))
    control = Steps(tensor(1, 2, 4, 5), tensor(1.0, 0.95, 0.9, 0.5, 0.55))
    assert target.least(control, threshold, low) == expected
