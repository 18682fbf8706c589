"""Certificates, against bisection on predictions."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic import line
from tangent_arithmetic.arithmetic.certificates import certified, certify, flips, radius
from tangent_arithmetic.arithmetic.line import Intervals, intervals
from tangent_arithmetic.arithmetic.logits import Logits
from tangent_arithmetic.arithmetic.steps import Plateau
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.test_line import INF, logits_of, tensor

AT = (0.4, -0.3, 0.1)
FAR = 1e3


def predicted(logits: Logits, points: Tensor) -> Tensor:
    """The class of each image at points of its own, (..., images, vectors), in float64."""
    moved = torch.einsum("...nk,knc->...nc", points, logits.steps.double())
    return (logits.base.double() + moved).argmax(dim=-1)


def bisected(logits: Logits, directions: Tensor) -> Tensor:
    """The distance to a flip of each image along directions of its own; at most `FAR`."""
    at = tensor(*AT).expand(directions.shape)
    answers = predicted(logits, at)
    low = torch.zeros(at.shape[:-1], dtype=torch.float64)
    high = torch.full_like(low, FAR)
    for _ in range(60):
        middle = (low + high) / 2
        stays = predicted(logits, at + middle[..., None] * directions) == answers
        low, high = middle.where(stays, low), high.where(stays, middle)
    return low


def test_flip_distances_are_those_of_bisection_along_random_directions() -> None:
    logits = logits_of(images=20)
    found = flips(logits, AT)
    assert torch.equal(found.answers, logits.predictions(AT))
    directions = torch.nn.functional.normalize(torch.randn(1000, 3).double(), dim=1)
    expected = bisected(logits, directions[:, None].expand(-1, 20, -1))
    along = [intervals(logits, u, AT, found.answers).high for u in directions.tolist()]
    found_along = torch.stack(along).clamp_max(FAR)
    torch.testing.assert_close(found_along, expected, rtol=1e-9, atol=1e-12)
    nearest = expected.amin(dim=0)
    assert bool((nearest >= found.distance * (1 - 1e-9)).all())
    assert bool((nearest < 1.05 * found.distance).all())  # one of them is nearly the best


def test_the_smallest_change_flips_the_answer_at_its_distance() -> None:
    logits = logits_of(images=200)
    found = flips(logits, AT)
    torch.testing.assert_close(found.change.norm(dim=1), found.distance)
    unit = found.change / found.distance[:, None]
    torch.testing.assert_close(bisected(logits, unit), found.distance, rtol=1e-9, atol=1e-12)
    here = tensor(*AT) + found.change
    assert torch.equal(predicted(logits, here + 1e-9 * unit), found.other)
    assert torch.equal(predicted(logits, here - 1e-9 * unit), found.answers)
    assert bool((found.other != found.answers).all())


def test_an_answer_that_no_change_flips() -> None:
    logits = logits_of(2, 2, 1)
    base, steps = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[[0.5, 0.5], [0.0, 2.0]]])
    found = flips(replace(logits, base=base, steps=steps))
    assert found.distance.tolist() == [INF, 0.5] and found.other.tolist() == [0, 0]
    assert found.change.tolist() == [[0.0], [-0.5]]
    whole = certify(replace(logits, base=base, steps=steps), {"v0": [1.0]})
    assert json.loads(json.dumps(whole.facts(), allow_nan=False)) == whole.facts()
    assert whole.radii == {1.0: 0.5, 0.99: 0.5, 0.95: 0.5}
    assert whole.ranges["v0"][1.0] == Plateau(-0.5, INF, 1.0)
    assert whole.facts()["ranges"]["v0"]["1"] == [-0.5, None]
    alone = certify(replace(logits, base=base[:1], steps=steps[:, :1], labels=torch.ones(1)), {})
    assert alone.facts()["radii"]["1"] is None and alone.accuracy == 0


@pytest.mark.parametrize("share", [1.0, 0.99, 0.95, 0.5])
def test_a_certified_range_is_tight(share: float) -> None:
    logits = logits_of(images=150)
    direction = (0.2, 1.0, -0.4)
    answers = logits.predictions(AT)

    def stays(coef: float) -> float:
        point = [a + coef * u for a, u in zip(AT, direction, strict=True)]
        return float((logits.predictions(point) == answers).double().mean())

    found = certify(logits, {"u": direction}, AT, [share]).ranges["u"][share]
    assert found.low < 0 < found.high
    grid = torch.linspace(found.low, found.high, 402, dtype=torch.float64)[1:-1].tolist()
    assert all(stays(coef) >= share for coef in grid)
    gap = 1e-9 * (found.high - found.low)
    assert stays(found.low - gap) < share and stays(found.high + gap) < share
    lowest = min(stays(found.low + gap), stays(found.high - gap))
    assert found.value == lowest >= share


def test_a_radius_bounds_the_flips_of_any_change() -> None:
    logits = logits_of(images=150)
    found = flips(logits, AT)
    lengths = {share: radius(found.distance, share) for share in (1.0, 0.95, 0.5)}
    assert lengths[1.0] == found.distance.min() < lengths[0.95] < lengths[0.5]
    for share, length in lengths.items():
        assert int((found.distance < length).sum()) == 150 - math.ceil(150 * share)
        for i in range(300):
            torch.manual_seed(i)
            move = torch.nn.functional.normalize(torch.randn(3).double(), dim=0) * length * 0.999999
            point = (tensor(*AT) + move).tolist()
            kept = (logits.predictions(point) == found.answers).double().mean()
            assert kept >= share
    first = int(found.distance.argmin())
    beyond = (tensor(*AT) + found.change[first] * (1 + 1e-9)).tolist()
    assert logits.predictions(beyond)[first] != found.answers[first]  # 1 is tight


def test_ranges_of_known_intervals() -> None:
    found = Intervals(tensor(-1, -2, -INF, -4), tensor(3, 1, 2, INF))
    assert certified(found, 1.0) == Plateau(-1, 1, 1.0)
    assert certified(found, 0.75) == Plateau(-2, 2, 0.75)
    assert certified(found, 0.6) == Plateau(-2, 2, 0.75)  # of four images, three
    assert certified(found, 0.5) == Plateau(-4, 3, 0.5)
    assert certified(found, 0.25) == Plateau(-INF, INF, 0.25)
    tied = Intervals(tensor(-1, INF), tensor(1, -INF))  # the answer at 0 is not unique
    assert certified(tied, 1.0) == Plateau(0, 0, 0.0)


def test_ranks_share_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(images=60)
    directions = {"v0": (1.0, 0.0, 0.0), "all": (1.0, 1.0, 1.0)}
    whole = certify(logits, directions, AT)
    assert whole.images == 60
    parts = [
        replace(logits, base=logits.base[r::2], steps=logits.steps[:, r::2],
                labels=logits.labels[r::2])
        for r in range(2)
    ]  # fmt: skip
    answers = [part.predictions(AT) for part in parts]
    gathers = iter([
        [(flips(p, AT).distance, a == p.labels) for p, a in zip(parts, answers, strict=True)],
        *([intervals(p, u, AT, a) for p, a in zip(parts, answers, strict=True)]
          for u in directions.values()),
    ])  # fmt: skip
    monkeypatch.setattr(ddp, "gather", lambda value: next(gathers))
    assert certify(parts[0], directions, AT) == whole


def test_chunks_do_not_change_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of()
    expected = certify(logits, {"v1": (0.0, 1.0, 0.0)}, AT)
    monkeypatch.setattr(line, "CHUNK", 100)
    assert certify(logits, {"v1": (0.0, 1.0, 0.0)}, AT) == expected


def test_nothing_is_certified_of_no_images_or_of_curved_logits() -> None:
    with pytest.raises(UsageError, match="no images to certify"):
        certify(logits_of(0), {})
    with pytest.raises(UsageError, match=r"normalises features and adds a bias.*head without bias"):
        certify(logits_of(bias=True), {})
    assert math.isfinite(certify(logits_of(bias=True, normalises=False), {}).radii[1.0])
