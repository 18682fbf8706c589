"""Linear probes: against scikit-learn, on small and odd sets, and deterministic."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tangent_arithmetic.encoders.probe import Labelled, fit
from tangent_arithmetic.runtime.errors import UsageError


def blobs(count: int, classes: int, width: int = 6, seed: int = 0) -> Labelled:
    """Features around one random centre a class."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return Labelled(centres[labels] + 0.7 * torch.randn(count, width, generator=generator), labels)


def names(classes: int) -> list[str]:
    return [f"class {i}" for i in range(classes)]


@torch.no_grad()
def test_the_probe_is_the_minimum_that_scikit_learn_finds() -> None:
    train, val, strength = blobs(120, 3), blobs(60, 3, seed=1), 0.01
    probe = fit(train, val, names(3), grid=[strength])
    scale = (train.features - train.features.mean(dim=0)).square().mean().sqrt()
    x = ((train.features - train.features.mean(dim=0)) / scale).double().numpy()
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=5000)
    theirs.fit(x, train.labels.numpy())
    expected = theirs.predict_log_proba(x)
    actual = probe.head(train.features).log_softmax(dim=1)
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    hits = probe.head(val.features).argmax(dim=1) == val.labels
    assert probe.accuracy == pytest.approx(float(hits.double().mean()))
    assert not probe.head.normalize and probe.head.classnames == ("class 0", "class 1", "class 2")


def test_the_same_pictures_give_the_same_head() -> None:
    one, other = (fit(blobs(50, 4), blobs(30, 4, seed=1), names(4)) for _ in range(2))
    assert torch.equal(one.head.weight, other.head.weight)
    assert one.regularisation == other.regularisation


def test_noise_is_regularised_more_than_signal() -> None:
    signal = fit(blobs(200, 4), blobs(100, 4, seed=1), names(4))
    labels = torch.randint(4, (60,))
    noise = fit(
        Labelled(torch.randn(60, 40), labels), Labelled(torch.randn(60, 40), labels), names(4)
    )
    assert noise.regularisation > signal.regularisation


def multilabel(count: int, seed: int) -> Labelled:
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return Labelled(features, (features[:, :3] > 0).to(torch.uint8))


@torch.no_grad()
def test_several_labels_an_image_are_fitted_one_by_one() -> None:
    probe = fit(multilabel(200, 0), multilabel(100, 1), names(3))
    test = multilabel(100, 2)
    correct = (probe.head(test.features) > 0) == test.labels.bool()
    assert float(correct.double().mean()) > 0.95 and probe.accuracy > 0.95


ODD: dict[str, tuple[Tensor, Tensor, int]] = {
    "one class": (torch.randn(5, 3), torch.zeros(5, dtype=torch.long), 1),
    "one picture": (torch.randn(1, 3), torch.zeros(1, dtype=torch.long), 2),
    "a class without pictures": (torch.randn(6, 3), torch.arange(6) % 2, 3),
    "equal features": (torch.ones(6, 3), torch.arange(6) % 2, 2),
    "a thousand classes": (torch.randn(1200, 8), torch.arange(1200) % 1000, 1000),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_sets_give_finite_heads(case: str) -> None:
    features, labels, classes = ODD[case]
    part = Labelled(features, labels)
    probe = fit(part, part, names(classes))
    assert probe.head.weight.shape == (classes, features.shape[1])
    assert all(bool(p.isfinite().all()) for p in probe.head.parameters())
    assert 0 <= probe.accuracy <= 1


def test_features_that_are_not_finite_are_refused() -> None:
    bad = Labelled(torch.tensor([[float("nan")], [1.0]]), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="features are not finite"):
        fit(bad, bad, names(2))
