"""Logits of linear models at any coefficients, against a head on the features in NumPy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from src.eval import eval_single_dataset
from tangent_arithmetic.arithmetic.features import Features
from tangent_arithmetic.arithmetic.logits import gathered, linear_logits, of_features
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.run.models import split_of, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.storage.statedict import State
from tests.small_suite import random_vector

IMAGES, CLASSES, WIDTH, VECTORS = 40, 5, 12, ("a", "b", "c")
POINTS = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (-0.7, 1.9, 0.05), (0.3, 0.3, 0.3), (-5.0, 0.1, 4.0)]


def features() -> Features:
    f0, *directions = torch.randn(1 + len(VECTORS), IMAGES, WIDTH)
    return Features(f0, directions, torch.randint(CLASSES, (IMAGES,)))


def head(normalises: bool, bias: bool) -> ClassificationHead:
    biases = torch.randn(CLASSES) if bias else None
    return ClassificationHead(normalises, torch.randn(CLASSES, WIDTH), biases)


def by_numpy(split: Features, own: ClassificationHead, point: tuple[float, ...]) -> np.ndarray:
    """Moves the features, then applies the head, in float64."""
    phi = split.f0.double().numpy().copy()
    for coef, direction in zip(point, split.directions, strict=True):
        phi += coef * direction.double().numpy()
    if own.normalize:
        phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    weight, bias = (p.detach().double().numpy() for p in (own.weight, own.bias))
    logits: np.ndarray = phi @ weight.T + bias
    return logits


@pytest.mark.parametrize(("normalises", "bias"), list(product([True, False], repeat=2)))
def test_logits_at_any_coefficients(normalises: bool, bias: bool) -> None:
    split, own = features(), head(normalises, bias)
    logits = of_features(split, own, "XVal", VECTORS)
    assert (logits.bias is not None) == bias
    assert (logits.gram is not None) == (bias and normalises)
    assert (logits.of, logits.dataset, logits.vectors) == (IMAGES, "XVal", VECTORS)
    for point in POINTS:
        expected, at = by_numpy(split, own, point), logits.at(point)
        assert at.dtype == torch.float64 and at.shape == (IMAGES, CLASSES)
        assert logits.predictions(point).tolist() == expected.argmax(axis=1).tolist()
        hits = (expected.argmax(axis=1) == split.labels.numpy()).mean()
        assert logits.accuracy(point) == pytest.approx(hits, abs=1e-12)
        if normalises and not bias:  # not divided by the norm: a positive factor for each image
            factor = (at.numpy() * expected).sum(axis=1) / (expected**2).sum(axis=1)
            assert (factor > 0).all()
            expected = factor[:, None] * expected
        np.testing.assert_allclose(at.numpy(), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="argument 2 is"):
        logits.at([1.0])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("bias", "ranks"), list(product([True, False], [1, 2, 3, 41])))
def test_shares_of_ranks_gather_to_the_whole(
    bias: bool, ranks: int, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, own = features(), head(True, bias)
    if several:
        labels = (torch.rand(IMAGES, CLASSES) < 0.5).to(torch.uint8)
        split = Features(split.f0, split.directions, labels)
    whole = of_features(split, own, "X", VECTORS)
    shares = []
    for rank in range(ranks):  # every `ranks`-th image; the last of 41 ranks has none
        f0, *directions = (x[rank::ranks] for x in (split.f0, *split.directions))
        if not len(f0):
            f0, directions = torch.zeros(0, 0), [torch.zeros(0, 0)] * len(directions)
        labels = split.labels[rank::ranks]
        if not len(f0):  # of batches whose images are not listed
            labels = torch.zeros(0, dtype=torch.int64)
        share = Features(f0, directions, labels)
        shares.append(of_features(share, own, "X", VECTORS))
    monkeypatch.setattr(ddp, "gather", lambda value: shares)
    for own_share in (shares[0], shares[-1]):
        again = gathered(own_share)
        assert torch.equal(again.labels, whole.labels)
        torch.testing.assert_close(again.at(POINTS[2]), whole.at(POINTS[2]), rtol=0, atol=1e-5)


def test_logits_without_vectors_are_those_of_theta0() -> None:
    split, own = features(), head(True, True)
    found = of_features(Features(split.f0, [], split.labels), own, "X", ())
    expected = of_features(split, own, "X", VECTORS)
    torch.testing.assert_close(found.at([]), expected.at(POINTS[0]))


def test_accuracies_agree_with_an_evaluation_of_the_edited_encoder(run: Run) -> None:
    encoder, _ = zeroshot_encoder(run)
    linear = linearized(encoder)
    theta0 = linear.model.theta0()
    vectors: dict[str, State] = {
        name: random_vector(theta0, seed=i) for i, name in enumerate(("one", "two"))
    }
    logits = linear_logits(linear, vectors, split_of(run, linear, "EmojiVal"))
    assert logits.of == len(logits.labels) == 20
    accuracies = set()
    for point in ((0.0, 0.0), (1.0, 0.0), (0.4, -0.8)):
        theta = {
            name: value + sum(c * tau[name] for c, tau in zip(point, vectors.values(), strict=True))
            for name, value in theta0.items()
        }
        linear.load_weights({**linear.weights(), **theta})
        top1 = eval_single_dataset(linear, "EmojiVal", run)["top1"]
        assert logits.accuracy(point) == pytest.approx(top1, abs=1e-12)
        accuracies.add(top1)
    assert len(accuracies) > 1
    sample = run.with_(sample=9)
    assert linear_logits(linear, vectors, split_of(sample, linear, "EmojiVal")).of == 20
