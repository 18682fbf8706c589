from __future__ import annotations

import random

import pytest

from tangent_arithmetic.runtime.eta import Estimate, Step, shown_time

KINDS = ("standard training", "linear training", "evaluation", "control")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (91, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert shown_time(seconds) == text


def test_nothing_is_known_before_the_first_step_is_done() -> None:
    estimate = Estimate([Step("a", 1), Step("a", 2), Step("b", 3)])
    assert estimate.left() is None
    estimate.skip()
    assert estimate.left() is None
    estimate.done(10)
    assert estimate.left() == pytest.approx(15)  # 5 seconds a cost
    estimate.done(9)
    assert estimate.left() == 0


def test_a_kind_has_its_own_pace_as_soon_as_it_is_measured() -> None:
    estimate = Estimate([Step("a", 1), Step("b", 1), Step("a", 1), Step("b", 1), Step("c", 1)])
    estimate.done(2)
    estimate.done(10)
    assert estimate.left() == pytest.approx(2 + 10 + 6)


def test_skipped_steps_do_not_count() -> None:
    estimate = Estimate([Step("a", 5), Step("a", 1), Step("a", 1)])
    estimate.skip()
    estimate.done(3)
    assert estimate.left() == pytest.approx(3)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_right_within_30_percent_from_the_first_third_on(seed: int) -> None:
    """Steps and kinds that differ from their costs, on a machine of another speed."""
    draw = random.Random(seed)
    pace = {kind: 7 * draw.uniform(0.88, 1.13) for kind in KINDS}
    kinds = [kind for kind, count in zip(KINDS, (8, 8, 6, 3), strict=True) for _ in range(count)]
    steps = [Step(kind, draw.uniform(1, 5)) for kind in kinds]
    seconds = [step.cost * pace[step.kind] * draw.uniform(0.85, 1.15) for step in steps]
    estimate = Estimate(steps)
    for i, spent in enumerate(seconds):
        estimate.done(spent)
        left = sum(seconds[i + 1 :])
        if sum(seconds[: i + 1]) >= sum(seconds) / 3 and left:
            slack = 0.3 * left + 0.02 * sum(seconds)  # the last seconds need no such care
            assert estimate.left() == pytest.approx(left, abs=slack)
