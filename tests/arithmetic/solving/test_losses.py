"""Losses and their derivatives, against PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.solving.losses import (
    Loss,
    Term,
    cross_entropy,
    entropy,
    imbalance,
    thinned,
    true_class,
)
from tests.arithmetic.solving.problems import logits, points, raw, reduced

LABELS = raw(0)[2]


def expected(loss: str, values: Tensor, w: Tensor) -> Tensor:
    p = values.softmax(dim=1)
    own = p[torch.arange(len(p)), LABELS]
    mean = (w[:, None] * p).sum(0)
    return {
        "cross_entropy": -(w * own.log()).sum(),
        "true_class": (w * own).sum(),
        "entropy": (w * torch.distributions.Categorical(probs=p).entropy()).sum(),
        "imbalance": (mean * (mean * p.shape[1]).log()).sum(),
    }[loss]


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "true_class": true_class,
    "entropy": entropy,
    "imbalance": imbalance(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(loss: str, weighted: bool) -> None:
    w = torch.rand(60, dtype=torch.float64)
    w = w / w.sum() if weighted else torch.full_like(w, 1 / 60)
    term = Term(reduced(0), LOSSES[loss], 0.7, w if weighted else None)
    for a in points(3):
        point = torch.tensor(a, requires_grad=True)
        true = 0.7 * expected(loss, logits(0, point), w)
        (gradient,) = torch.autograd.grad(true, point)
        value, found = term.value_and_gradient(a, None)
        assert value == pytest.approx(float(true.detach()), abs=1e-6) == term.value(a, None)
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-5)
        norms = term.reduced.norms(points(4)[-1])  # constants
        true = 0.7 * expected(loss, logits(0, point, False) / norms[:, None], w)
        (gradient,) = torch.autograd.grad(true, point)
        value, found = term.value_and_gradient(a, norms)
        assert value == pytest.approx(float(true.detach()), abs=1e-6)
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_curvature_of_cross_entropy(weighted: bool) -> None:
    w = torch.rand(60, dtype=torch.float64)
    w = w / w.sum() if weighted else torch.full_like(w, 1 / 60)
    term = Term(reduced(0), cross_entropy, 0.7, w if weighted else None)
    a = points(1)[0]
    norms = term.reduced.norms(a)

    def value(point: Tensor) -> Tensor:
        return 0.7 * expected("cross_entropy", logits(0, point, False) / norms[:, None], w)

    exact = torch.autograd.functional.hessian(value, torch.tensor(a))
    np.testing.assert_allclose(term.curvature(a, norms), exact, rtol=1e-4, atol=1e-5)


def test_several_labels_an_image_have_a_loss_each() -> None:
    labels = (torch.rand(60, 4) < 0.4).to(torch.uint8)
    split, a = replace(reduced(0), labels=labels), points(1)[0]
    at = logits(0, torch.tensor(a))
    for loss, true in (
        (cross_entropy, F.binary_cross_entropy_with_logits(at, labels.double())),
        (true_class, torch.where(labels.bool(), at.sigmoid(), 1 - at.sigmoid()).mean()),
    ):
        assert Term(split, loss).value(a, None) == pytest.approx(float(true.detach()), abs=1e-6)
    assert not Term(split, cross_entropy).convex and Term(reduced(0), cross_entropy).convex
    classes = [average_precision_score(labels[:, c], at[:, c]) for c in range(at.shape[1])]
    assert split.accuracy(a) == pytest.approx(np.mean(classes))


def test_a_prior_and_a_part_of_the_images() -> None:
    split, a = reduced(0), points(1)[0]
    p = logits(0, torch.tensor(a)).softmax(1).mean(0)
    assert Term(split, imbalance(p)).value(a, None) == pytest.approx(0, abs=1e-6)
    term = Term(split, cross_entropy)
    alone = Term(split.take(slice(None, None, 3)), cross_entropy)
    for chosen in (slice(None, None, 3), torch.arange(0, 60, 3)):
        assert term.on(chosen).value(a, None) == pytest.approx(alone.value(a, None))
    weights = torch.rand(60, dtype=torch.float64)
    halves = replace(alone, weights=weights[::3] / weights[::3].sum())
    heavy = replace(term, weights=weights / weights.sum()).on(chosen)
    assert heavy.value(a, None) == pytest.approx(halves.value(a, None))
    norms = split.norms(a)
    assert term.rootless().value(a, norms) == pytest.approx(term.value(a, None))
    assert thinned([term, term], 61) is None
    assert [len(own.reduced) for own in thinned([term, term], 50) or []] == [30, 30]
