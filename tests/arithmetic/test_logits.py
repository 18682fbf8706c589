"""Logits of linear models at any coefficients, against a head on the features in NumPy."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from src.eval import eval_single_dataset
from tangent_arithmetic.arithmetic.features import Features
from tangent_arithmetic.arithmetic.logits import Logits, gathered, linear_logits, of_features
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import LinearizedImageEncoder
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.models import split_of, zeroshot_encoder
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.storage.statedict import State
from tests.small_suite import random_vector

IMAGES, CLASSES, WIDTH, VECTORS = 40, 5, 12, ("a", "b", "c")
POINTS = [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (-0.7, 1.9, 0.05), (0.3, 0.3, 0.3), (-5.0, 0.1, 4.0)]
HEADS = list(product([True, False], [True, False]))  # normalises, bias


def features(images: int = IMAGES) -> Features:
    f0, *directions = torch.randn(1 + len(VECTORS), images, WIDTH)
    return Features(f0, directions, torch.randint(CLASSES, (images,)))


def head(normalises: bool, bias: bool) -> ClassificationHead:
    biases = torch.randn(CLASSES) if bias else None
    return ClassificationHead(normalises, torch.randn(CLASSES, WIDTH), biases)


def by_numpy(found: Features, own: ClassificationHead, point: tuple[float, ...]) -> np.ndarray:
    """Moves the features, then applies the head, in float64."""
    phi = found.f0.double().numpy().copy()
    for coef, direction in zip(point, found.directions, strict=True):
        phi += coef * direction.double().numpy()
    if own.normalize:
        phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    weight, bias = (p.detach().double().numpy() for p in (own.weight, own.bias))
    logits: np.ndarray = phi @ weight.T + bias
    return logits


@pytest.mark.parametrize(("normalises", "bias"), HEADS)
@pytest.mark.parametrize("point", POINTS)
def test_logits_at_any_coefficients(normalises: bool, bias: bool, point: tuple[float, ...]) -> None:
    found, own = features(), head(normalises, bias)
    logits = of_features(found, own, "XVal", VECTORS)
    expected = by_numpy(found, own, point)
    at = logits.at(point)
    assert at.dtype == torch.float64 and at.shape == (IMAGES, CLASSES)
    assert logits.predictions(point).tolist() == expected.argmax(axis=1).tolist()
    hits = (expected.argmax(axis=1) == found.labels.numpy()).mean()
    assert logits.accuracy(point) == pytest.approx(hits, abs=1e-12)
    if bias or not normalises:
        np.testing.assert_allclose(at.numpy(), expected, rtol=0, atol=2e-5)
    else:  # without a bias the norm is left out: each image's row by one positive factor
        factor = (at.numpy() * expected).sum(axis=1) / (expected**2).sum(axis=1)
        assert (factor > 0).all()
        np.testing.assert_allclose(at.numpy(), factor[:, None] * expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("normalises", "bias"), HEADS)
def test_what_is_not_needed_is_not_kept(normalises: bool, bias: bool) -> None:
    logits = of_features(features(), head(normalises, bias), "X", VECTORS)
    assert (logits.bias is not None) == bias
    assert (logits.gram is not None) == (bias and normalises)
    assert (logits.of, logits.dataset, logits.vectors) == (IMAGES, "X", VECTORS)


def test_a_number_of_coefficients_that_is_not_that_of_the_vectors() -> None:
    logits = of_features(features(), head(True, False), "X", VECTORS)
    with pytest.raises(ValueError, match="argument 2 is"):
        logits.at([1.0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_has_the_logits_of_its_images(bias: bool) -> None:
    logits = of_features(features(), head(True, bias), "X", VECTORS)
    chosen = torch.tensor([30, 2, 2, 7])
    part = logits.part(chosen)
    expected = logits.at(POINTS[2])[chosen]
    torch.testing.assert_close(part.at(POINTS[2]), expected, rtol=0, atol=1e-12)
    assert torch.equal(part.labels, logits.labels[chosen]) and part.of == IMAGES


@pytest.mark.parametrize(("bias", "ranks"), list(product([True, False], [2, 3, 41])))
def test_the_ranks_shares_make_the_whole(
    bias: bool, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, own = features(), head(True, bias)
    whole = of_features(found, own, "X", VECTORS)
    shares = []
    for rank in range(
        ranks
    ):  # as `tangent_arithmetic.data.loading.share` cuts them; the last of 41 has none
        part = [x[rank::ranks] for x in (found.f0, *found.directions)]
        if not len(part[0]):
            part = [torch.zeros(0, 0)] * len(part)
        share = Features(part[0], part[1:], found.labels[rank::ranks])
        shares.append(of_features(share, own, "X", VECTORS))
    monkeypatch.setattr(ddp, "gather", lambda value: shares)
    again = gathered(shares[0])
    assert torch.equal(again.labels, whole.labels)
    torch.testing.assert_close(again.at(POINTS[2]), whole.at(POINTS[2]), rtol=0, atol=1e-5)


def test_alone_there_is_nothing_to_gather() -> None:
    logits = of_features(features(), head(True, True), "X", VECTORS)
    assert gathered(logits) is logits


def test_an_evaluation_of_the_edited_encoder_finds_the_same(run: Config) -> None:
    encoder, _ = zeroshot_encoder(Run.of(run))
    linear = LinearizedImageEncoder(image_encoder=encoder)
    theta0 = linear.model.theta0()
    vectors: dict[str, State] = {
        name: random_vector(theta0, seed=i) for i, name in enumerate(("one", "two"))
    }
    logits: Logits = linear_logits(linear, vectors, split_of(Run.of(run), linear, "EmojiVal"))
    assert logits.of == len(logits.labels) == 40
    found = []
    for point in ((0.0, 0.0), (1.0, 0.0), (0.4, -0.8)):
        theta = {
            name: value + sum(c * tau[name] for c, tau in zip(point, vectors.values(), strict=True))
            for name, value in theta0.items()
        }
        linear.load_weights({**linear.weights(), **theta})
        found.append(eval_single_dataset(linear, "EmojiVal", run)["top1"])
        assert logits.accuracy(point) == pytest.approx(found[-1], abs=1e-12)
    assert len(set(found)) > 1
    sample = replace(run, sample=15)
    assert linear_logits(linear, vectors, split_of(Run.of(sample), linear, "EmojiVal")).of == 40
