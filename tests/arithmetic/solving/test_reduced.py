"""Reduced splits, against heads on moved features in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic.solving import reduced as module
from tangent_arithmetic.arithmetic.solving.reduced import reduce
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.runtime.errors import UsageError
from tests.arithmetic.solving.problems import DIRECTIONS, logits, points, reduced
from tests.arithmetic.tiny import CLASSES, FEATURES, IMAGES, Convolution, pictures
from tests.small_suite import random_vector


# a root is the features where directions are many, else their triangular factor
@pytest.mark.parametrize("count", [2, FEATURES + 2])
@pytest.mark.parametrize(("normalises", "biased"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("mapped", [False, True])
def test_logits_are_those_of_the_moved_linear_model(
    count: int, normalises: bool, biased: bool, mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: E501
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "LARGE", 0 if mapped else 2**30)
    monkeypatch.setattr(module, "CHUNK", 100)
    encoder = linearized(Convolution())
    theta0 = {n: v.clone() for n, v in encoder.theta0().items()}
    vectors = [random_vector(theta0, 0.4, seed) for seed in range(count)]
    bias = torch.randn(CLASSES) if biased else None
    head = ClassificationHead(normalises, torch.randn(CLASSES, FEATURES), bias)
    split = Split("X", head, EvalBatches(pictures(), encoder.val_preprocess, batch_size=10))
    found = reduce(encoder, vectors, split, tmp_path)
    assert len(found) == IMAGES and bool(list(tmp_path.iterdir())) == mapped
    rank = min(count + 1, FEATURES)
    shape = None if found.root is None else found.root.shape
    assert shape == ((IMAGES, rank, count + 1) if normalises else None)
    for a in points(3, count):
        moved = {n: v + sum(float(c) * tau[n] for c, tau in zip(a, vectors, strict=True))
                 for n, v in theta0.items()}  # fmt: skip
        encoder.load_weights({**encoder.weights(), **moved})
        with torch.no_grad():
            expected = torch.cat([head(encoder(images)) for images, _ in split.batches])
        labels = torch.cat([labels for _, labels in split.batches])
        at = found.logits(a)
        assert at.dtype == torch.float64 and found.labels.tolist() == labels.tolist()
        torch.testing.assert_close(at.float(), expected, rtol=1e-4, atol=1e-4)
        assert found.accuracy(a) == float((at.argmax(1) == labels).double().mean())


@pytest.mark.parametrize("normalises", [True, False])
def test_logits_and_derivatives_against_autograd(normalises: bool) -> None:
    split, weights = reduced(1, normalises), torch.randn(60, 4, dtype=torch.float64)
    for a in points(3):
        point = torch.tensor(a, requires_grad=True)
        expected = logits(1, point, normalises)
        torch.testing.assert_close(split.logits(a), expected.detach(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(split.logits(a, torch.ones(60)), split.affine(a), rtol=1e-12)
        (gradient,) = torch.autograd.grad((logits(1, point, False) * weights).sum(), point)
        np.testing.assert_allclose(split.pull(weights), gradient, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_norms_against_differences() -> None:
    split, weights = reduced(2), torch.randn(60, dtype=torch.float64)
    a = points(1)[0]

    def total(point: np.ndarray) -> float:
        return float((split.norms(point) * weights).sum())

    steps = 1e-5 * np.eye(DIRECTIONS)
    expected = [(total(a + step) - total(a - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(split.norm_gradient(a, weights), expected, rtol=1e-6)


def test_a_part_of_the_images() -> None:
    whole, a = reduced(3), points(1)[0]
    for images in (slice(None, None, 7), [5, 2, 11]):
        part = whole.take(images)
        torch.testing.assert_close(part.logits(a), whole.logits(a)[images])
        assert part.labels.tolist() == whole.labels[images].tolist()


def test_along_sums_of_the_directions() -> None:
    split, sums = reduced(4), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, -2.0]])
    both = split.along(sums)
    for a in points(3, 2):
        torch.testing.assert_close(both.logits(a), split.logits(sums @ a), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(both.norms(a), split.norms(sums @ a), rtol=1e-5)


def test_other_heads_are_refused() -> None:
    encoder = linearized(Convolution())
    split = Split("X", torch.nn.Linear(FEATURES, 2), [])
    with pytest.raises(UsageError, match=r"\(ClassificationHead\), got Linear"):
        reduce(encoder, [], split)
