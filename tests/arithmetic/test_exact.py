"""The exact optima of addition and negation, against sweeps of the same encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tangent_arithmetic.arithmetic import addition
from tangent_arithmetic.arithmetic.addition import NEAR, add
from tangent_arithmetic.arithmetic.line import lines
from tangent_arithmetic.arithmetic.negation import negate
from tangent_arithmetic.arithmetic.steps import Steps
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.base import Encoder
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.storage.statedict import State, scale
from tests.arithmetic.tiny import CLASSES, FEATURES, Convolution, multilabel_pictures, pictures
from tests.small_suite import random_vector

NAMES = ("one", "two")
COEFS = [0.0, 0.5, 1.0]


def split(name: str, images: int, bias: bool = False, normalises: bool = True) -> Split:
    """Random images and a random head, both depending on the name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weight = torch.randn(CLASSES, FEATURES, generator=generator)
    biases = torch.randn(CLASSES, generator=generator) if bias else None
    head = ClassificationHead(normalises, weight, biases)
    batches = EvalBatches(pictures(images), Convolution().val_preprocess, 10)
    return Split(name, head, batches)


VAL, TEST = [split("oneVal", 40), split("twoVal", 24)], [split("one", 30), split("two", 20)]
REFERENCES = {"oneVal": 0.5, "twoVal": 0.75, "one": 0.5, "two": 0.75}


def linear_encoder() -> tuple[Encoder, State]:
    encoder = linearized(Convolution().eval())
    return encoder, random_vector(encoder.theta0(), size=2.0)


def added(encoder: Encoder, tau: State, val: list[Split] = VAL, **references: float) -> Any:
    return add(encoder, tau, val, TEST, {**REFERENCES, **references}, COEFS)


def test_the_exact_optimum_of_a_sum_is_no_worse_than_any_coefficient() -> None:
    encoder, tau = linear_encoder()
    found = added(encoder, tau)
    exact = found["exact"]
    low, high = (np.inf if end is None else end for end in exact["plateau"])
    low = -np.inf if exact["plateau"][0] is None else low
    assert low <= exact["coefficient"] <= high

    def value(coefs: list[float]) -> np.ndarray:
        parts = [np.array(s.sweep(encoder, tau, coefs)) / REFERENCES[s.name] for s in VAL]
        return np.mean(parts, axis=0)

    everywhere = np.concatenate([np.linspace(-3, 3, 1201), np.linspace(-60, 60, 301)])
    assert value(list(everywhere)).max() <= exact["value"] + 1e-12
    inside = [exact["coefficient"], *(e + d for e, d in ((low, 1e-5), (high, -1e-5)))]
    np.testing.assert_allclose(value([c for c in inside if np.isfinite(c)]), exact["value"])
    beyond = [e + d for e, d in ((low, -1e-5), (high, 1e-5)) if np.isfinite(e)]
    assert beyond and (value(beyond) < exact["value"]).all()
    near = [e for e in exact["near"] if e is not None]
    first, last = near if len(near) == 2 else (low, high)
    between = np.linspace(first, last, 50)[1:-1]
    assert (value(list(between)) >= exact["value"] - NEAR).all()
    best = max(metrics["avg_normalized_top1"] for metrics in found["val"].values())
    assert exact["value"] >= best and found["coefficient"] in COEFS  # the rule is unchanged
    on_test = [s.sweep(encoder, tau, [exact["coefficient"]])[0] for s in TEST]
    assert [exact["test"][f"{name}:top1"] for name in NAMES] == on_test


@pytest.mark.parametrize("loss", [0.03, 0.09])
def test_the_near_range_is_as_wide_as_the_loss_allows(
    loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, tau = linear_encoder()
    monkeypatch.setattr(addition, "NEAR", loss)
    exact, found = added(encoder, tau)["exact"], lines(encoder, tau, VAL)
    assert found is not None

    def lost(coefs: np.ndarray) -> np.ndarray:
        first, second = (line.at(torch.from_numpy(coefs)).numpy() for line in found)
        left: np.ndarray = exact["value"] - (first / 0.5 + second / 0.75) / 2
        return left

    low, high = exact["near"]
    inside = np.linspace(-50.0 if low is None else low, 50.0 if high is None else high, 5001)
    assert lost(inside[:-1]).max() <= loss + 1e-12
    beyond = ([] if low is None else [low - 1e-9]) + ([] if high is None else [high])
    assert beyond and lost(np.array(beyond)).min() > loss


@pytest.mark.parametrize(
    ("edges", "values", "near"),
    [
        ([-1e17], [1.0, 0.0], [None, -1e17]),
        ([1e17], [0.0, 1.0], [1e17, None]),
        ([0.0, 1.0, 2.0, 3.0], [0.0, 0.035, 0.03, 0.029, 0.0], [0.0, 2.0]),  # half a point, rounded
    ],
)
def test_the_near_range_of_known_steps(
    edges: list[float], values: list[float], near: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Steps(*(torch.tensor(each, dtype=torch.float64) for each in (edges, values)))
    monkeypatch.setattr(addition, "lines", lambda *_: [known])
    encoder, tau = linear_encoder()
    found = addition.exact_optimum(encoder, tau, VAL[:1], {"oneVal": 1.0})
    assert found is not None and found["near"] == near
    assert known.at([found["coefficient"]]).tolist() == [found["value"]] == [max(values)]


def test_a_task_without_reference_does_not_count() -> None:
    encoder, tau = linear_encoder()
    alone = lines(encoder, tau, VAL[:1])
    assert alone is not None
    exact = added(encoder, tau, twoVal=0.0)["exact"]
    assert exact["value"] == pytest.approx(alone[0].best().value / 0.5)
    assert "exact" not in added(encoder, tau, oneVal=0.0, twoVal=0.0)


@pytest.mark.parametrize("least", [0.0, 0.2, 0.3])
def test_the_exact_negation_is_no_worse_than_any_coefficient(least: float) -> None:
    encoder, tau = linear_encoder()
    found = negate(encoder, tau, (VAL[0], VAL[1]), (TEST[0], TEST[1]), least, COEFS)
    swept = np.concatenate([np.linspace(0, 3, 601), np.linspace(0, 60, 301)])
    negated = scale(tau, -1.0)
    task, control = (np.array(s.sweep(encoder, negated, list(swept))) for s in VAL)
    exact = found.get("exact")
    if exact is None:
        assert (control < least).all()
        return
    assert exact["coefficient"] >= 0 and exact["value"] <= task[control >= least].min() + 1e-12
    at = [exact["coefficient"]]
    assert VAL[0].sweep(encoder, negated, at) == [pytest.approx(exact["value"])]
    assert VAL[1].sweep(encoder, negated, at)[0] >= least
    assert [exact["test"], exact["test_control"]] == [
        s.sweep(encoder, negated, at)[0] for s in TEST
    ]


def test_a_control_set_that_nothing_keeps() -> None:
    encoder, tau = linear_encoder()
    found = negate(encoder, tau, (VAL[0], VAL[1]), (TEST[0], TEST[1]), 1.01, COEFS)
    assert "exact" not in found and not found["qualified"] and found["coefficient"] == 0


def no_lines(kind: str) -> list[Split]:
    if kind == "curved":
        return [VAL[0], split("twoVal", 24, bias=True)]
    if kind == "several labels":
        batches = EvalBatches(multilabel_pictures(), Convolution().val_preprocess, 10)
        return [VAL[0], replace(VAL[1], batches=batches)]
    if kind == "another head":
        return [VAL[0], replace(VAL[1], head=torch.nn.Linear(FEATURES, CLASSES))]
    return [VAL[0], replace(VAL[1], batches=iter(list(VAL[1].batches)))]


@pytest.mark.parametrize("kind", ["curved", "several labels", "another head", "read once"])
def test_splits_without_exact_lines_have_the_rule_alone(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, tau = linear_encoder()
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        found = added(encoder, tau, no_lines(kind))
    assert "exact" not in found and found["coefficient"] in COEFS
    assert caplog.text.count("no exact line: ") == 1


def test_a_standard_encoder_has_no_exact_line() -> None:
    encoder = Convolution().eval()
    assert "exact" not in added(encoder, random_vector(encoder.weights()))


def test_a_bias_without_normalisation_has_exact_lines() -> None:
    encoder, tau = linear_encoder()
    own = split("three", 40, bias=True, normalises=False)
    (line,) = lines(encoder, tau, [own]) or []
    coefs = list(np.linspace(-2, 2, 101))
    np.testing.assert_allclose(line.at(coefs), own.sweep(encoder, tau, coefs))
