"""The exact line, against the predictions at many coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic import line
from tangent_arithmetic.arithmetic.features import Features
from tangent_arithmetic.arithmetic.line import Intervals, accuracy, affine, intervals, obstacle
from tangent_arithmetic.arithmetic.logits import Logits, of_features
from tangent_arithmetic.arithmetic.steps import Plateau
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

INF = math.inf


def logits_of(
    images: int = 300,
    classes: int = 7,
    vectors: int = 3,
    normalises: bool = True,
    bias: bool = False,
    seed: int = 0,
) -> Logits:
    """Random features under a random head."""
    torch.manual_seed(seed)
    f0, *steps = torch.randn(1 + vectors, images, 12)
    head = ClassificationHead(
        normalises, torch.randn(classes, 12), torch.randn(classes) if bias else None
    )
    features = Features(f0, list(steps), torch.randint(classes, (images,)))
    return of_features(features, head, "X", [f"v{k}" for k in range(vectors)])


def cauchy(count: int, seed: int = 1) -> np.ndarray:
    """Coefficients of all sizes."""
    found: np.ndarray = np.random.default_rng(seed).standard_cauchy(count)
    return found


def tie(logits: Logits, at: Sequence[float]) -> Tensor:
    """Whether the two highest logits of each image are the same up to rounding."""
    values = logits.at(at)
    top = values.topk(2, dim=1).values
    return top[:, 0] - top[:, 1] <= 1e-12 * (1 + max(map(abs, at)))


@pytest.mark.parametrize(("normalises", "bias"), [(True, False), (False, False), (False, True)])
def test_every_image_at_ten_thousand_coefficients(normalises: bool, bias: bool) -> None:
    logits = logits_of(images=100, normalises=normalises, bias=bias)
    start, direction = (0.3, -0.2, 0.0), (1.0, -0.7, 1.9)
    found = intervals(logits, direction, start)
    for ends in (found.low, found.high):
        for image in ends.isfinite().nonzero().flatten().tolist():
            coef = float(ends[image])  # at an end two classes tie
            point = [a + coef * u for a, u in zip(start, direction, strict=True)]
            assert bool(tie(logits, point)[image])
    right, ties = 0, 0
    for coef in cauchy(10_000):
        point = [a + coef * u for a, u in zip(start, direction, strict=True)]
        expected = logits.predictions(point) == logits.labels
        inside = (found.low <= coef) & (coef < found.high)
        differ = expected != inside
        assert bool(tie(logits, point)[differ].all())
        right, ties = right + int(inside.sum()), ties + int(differ.sum())
    assert 0.02 < right / (10_000 * len(logits.labels)) < 0.5 and ties < 10


def test_images_that_are_always_or_never_right_and_equal_lines() -> None:
    base = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    steps = torch.zeros(1, 4, 3)
    cases = replace(logits_of(4, 3, 1), base=base, steps=steps)
    found = intervals(replace(cases, labels=torch.tensor([0, 1, 0, 1])), [1.0])
    assert found.low.tolist() == [-INF, INF, -INF, INF]  # of equal lines the first class
    assert found.high.tolist() == [INF, -INF, INF, -INF]
    invalid = intervals(replace(cases, labels=torch.tensor([-1, 3, -100, 0])), [1.0])
    assert (invalid.low < invalid.high).tolist() == [False, False, False, True]
    share = found.share()
    assert len(share.edges) == 0 and share.values.tolist() == [0.5]


def test_known_lines() -> None:
    """Class 0 is flat at 0, class 1 rises through -1 at 1, class 2 falls through it at -1."""
    logits = replace(
        logits_of(3, 3, 1),
        base=torch.tensor([[0.0, -1.0, -1.0]]).repeat(3, 1),
        steps=torch.tensor([[0.0, 1.0, -1.0]]).repeat(1, 3, 1),
        labels=torch.tensor([0, 1, 2]),
    )
    found = intervals(logits, [1.0])
    assert found.low.tolist() == [-1.0, 1.0, -INF] and found.high.tolist() == [1.0, INF, -1.0]
    moved = intervals(logits, [2.0], start=[0.5])
    assert moved.low.tolist() == [-0.75, 0.25, -INF]
    assert intervals(logits, [1.0], classes=torch.zeros(3).long()).low.tolist() == [-1.0] * 3
    share = found.share()  # one image is right everywhere: neither edge is a step
    assert len(share.edges) == 0 and share.values.tolist() == [1 / 3]
    assert share.best() == Plateau(-INF, INF, 1 / 3) and share.best().coefficient == 0


@pytest.mark.parametrize("chunk", [1, 50, 10**9])
def test_chunks_do_not_change_the_line(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of()
    expected = intervals(logits, [1.0, 1.0, 1.0])
    monkeypatch.setattr(line, "CHUNK", chunk)
    sizes = [len(base) for _, base, _ in affine(logits, [0, 0, 0], [1, 1, 1])]
    assert sum(sizes) == 300 and max(sizes) == min(300, max(1, chunk // 7))
    found = intervals(logits, [1.0, 1.0, 1.0])
    assert torch.equal(found.low, expected.low) and torch.equal(found.high, expected.high)


def test_accuracy_is_that_of_the_logits_and_its_best_is_the_best() -> None:
    logits = logits_of(images=60, vectors=1)
    steps = accuracy(logits, [1.0])
    coefs = np.concatenate([cauchy(2000), np.linspace(0, 1, 101)])
    expected = torch.tensor([logits.accuracy([c]) for c in coefs], dtype=torch.float64)
    assert torch.equal(steps.at(torch.from_numpy(coefs)), expected)
    assert bool((steps.edges.diff() > 0).all()) and bool((steps.values.diff() != 0).all())
    best = steps.best()
    assert best.value == steps.values.max() >= expected.max()
    for coef in (best.coefficient, best.low + 1e-9, best.high - 1e-9):
        assert logits.accuracy([coef]) == pytest.approx(best.value, abs=1e-12)
    for outside in (best.low - 1e-9, best.high + 1e-9):
        assert logits.accuracy([outside]) < best.value


def test_ranks_share_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of()
    whole = accuracy(logits, [1.0, 0.0, 0.0])
    shares = [
        intervals(
            replace(logits, base=logits.base[r::3], steps=logits.steps[:, r::3],
                    labels=logits.labels[r::3]),
            [1.0, 0.0, 0.0],
        )
        for r in range(3)
    ]  # fmt: skip
    monkeypatch.setattr(ddp, "gather", lambda value: shares)
    found = accuracy(logits, [1.0, 0.0, 0.0])
    assert torch.equal(found.edges, whole.edges) and torch.equal(found.values, whole.values)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_step_function_is_continuous_from_the_right() -> None:
    found = Intervals(tensor(0, 1, -INF, 1, INF), tensor(1, 2, 0.5, INF, -INF)).share()
    assert found.edges.tolist() == [0, 0.5, 1, 2]
    assert found.values.tolist() == [0.2, 0.4, 0.2, 0.4, 0.2]
    assert found.at([-1, 0, 0.49, 0.5, 1, 2]).tolist() == [0.2, 0.4, 0.4, 0.2, 0.4, 0.2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(9, 7, dtype=torch.uint8)}, "several labels an image.*a sweep over"),
        ({"bias": torch.ones(7), "gram": torch.ones(9, 4, 4)}, "normalises features and adds a"),
        ({"base": torch.full((9, 7), torch.nan)}, "not finite, expected finite numbers"),
    ],
)
def test_what_has_no_exact_line(change: dict[str, Tensor], message: str) -> None:
    logits = replace(logits_of(9), **change)  # type: ignore[arg-type]
    assert (obstacle(logits) is None) == ("base" in change)
    with pytest.raises(UsageError, match=message):
        intervals(logits, [1.0, 1.0, 1.0])


def test_an_empty_split_has_no_accuracy() -> None:
    with pytest.raises(UsageError, match="the split is empty"):
        accuracy(logits_of(0), [1.0, 1.0, 1.0])
