"""Metrics that follow from the labels: against scikit-learn, and however images are divided."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, recall_score
from torch import Tensor

from tangent_arithmetic.arithmetic.addition import add
from tangent_arithmetic.arithmetic.average_precision import (
    average_precision,
    mean_average_precision,
)
from tangent_arithmetic.arithmetic.metrics import main_metric, nonlinear_advantage, normalized
from tangent_arithmetic.arithmetic.negation import negate
from tangent_arithmetic.arithmetic.sweeps import Split, sweep_splits
from tangent_arithmetic.arithmetic.tally import Tally, measured, scores
from tangent_arithmetic.data.loading import EvalBatches
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import PictureError, UsageError
from tests.arithmetic.tiny import CLASSES, FEATURES, Convolution, multilabel_pictures, pictures
from tests.small_suite import random_vector

COEFS = [0.0, 0.4, 1.0]
both = pytest.mark.parametrize("linear", [False, True])


def several(images: int = 40, classes: int = 6, rounded: bool = False) -> tuple[Tensor, Tensor]:
    """Random scores and labels of which the last class has none; rounded scores have ties."""
    rng = np.random.default_rng(images)
    values = rng.standard_normal((images, classes))
    labels = (rng.random((images, classes)) < 0.3).astype(np.uint8)
    labels[:, -1], labels[0, :-1] = 0, 1
    return torch.from_numpy(values.round() if rounded else values), torch.from_numpy(labels)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("images", [1, 2, 40, 301])
def test_average_precision_is_scikit_learns(images: int, rounded: bool) -> None:
    values, labels = several(images, rounded=rounded)
    each = [average_precision_score(labels[:, k], values[:, k]) for k in range(5)]
    found = [average_precision(values[:, k], labels[:, k]) for k in range(5)]
    assert found == pytest.approx(each, abs=1e-14)
    assert mean_average_precision(values, labels) == pytest.approx(np.mean(each), abs=1e-14)


@given(
    pairs=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
def test_average_precision_depends_on_neither_order_nor_scale(
    pairs: list[tuple[int, bool]], seed: int
) -> None:
    values = torch.tensor([float(value) for value, _ in pairs])
    truth = torch.tensor([flag for _, flag in pairs])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    found = average_precision(values, truth)
    assert found == average_precision(3 * values[order] - 7, truth[order])
    assert 0 < found <= 1 if bool(truth.any()) else found == 0


def test_scores_that_are_no_numbers_rank_last() -> None:
    truth = torch.tensor([True, False, False])
    assert average_precision(torch.tensor([math.nan, 1.0, 2.0]), truth) == pytest.approx(1 / 3)
    assert average_precision(torch.tensor([3.0, math.nan, math.nan]), truth) == 1.0
    blind = torch.full((3,), math.nan)
    assert average_precision(blind, truth) == pytest.approx(1 / 3)  # chance


def test_a_split_without_any_label_has_no_mean_average_precision() -> None:
    with pytest.raises(UsageError, match="none of 4 images has a label"):
        mean_average_precision(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0] * 90 + [1] * 9 + [2], 5),  # unbalanced, one class of one image, two that never occur
        ([0, 0, 0], 1),
        (list(range(1000)) * 2, 1000),
    ],
)
def test_accuracies_are_scikit_learns(labels: list[int], classes: int) -> None:
    truth = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(labels), classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(len(labels)), truth] += 2
    guess = logits.argmax(dim=1)
    found = measured(logits, truth)
    assert list(found) == ["top1", "balanced"]
    assert found["top1"] == int((guess == truth).sum()) / len(labels)
    recalls = recall_score(truth, guess, labels=truth.unique(), average=None)
    assert found["balanced"] == pytest.approx(np.mean(recalls), abs=1e-14)


def test_images_with_labels_of_no_class_are_errors_of_the_model() -> None:
    found = measured(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, -1, 7]))
    assert found == {"top1": 0.5, "balanced": pytest.approx(2 / 3)}


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("shares", [[40], [7, 33], [0, 40], [13, 0, 27]])
def test_metrics_do_not_depend_on_batches_or_ranks(
    monkeypatch: pytest.MonkeyPatch, kind: int, shares: list[int]
) -> None:
    values, labels = several()
    labels = labels if kind == 2 else labels.argmax(dim=1)
    expected = measured(values, labels)
    tallies = []
    for part, truth in zip(values.split(shares), labels.split(shares), strict=True):
        tallies.append(Tally())
        for batch, wanted in zip(part.split(5), truth.split(5), strict=True):
            tallies[-1].add(batch, wanted)
    monkeypatch.setattr(ddp, "gather", lambda own: [[tally.joined()] for tally in tallies])
    (found,) = scores(tallies[:1])
    assert found == {**expected, "num_images": 40}


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(UsageError, match="no images to evaluate on"):
        scores([Tally()])
    assert scores([]) == []


@pytest.mark.parametrize("shape", [(6, 3), (6, 7), (6, 1), (5,), (6, 5, 1)])
def test_labels_that_do_not_fit_the_logits_are_refused(shape: tuple[int, ...]) -> None:
    labels = torch.ones(shape, dtype=torch.uint8)
    with pytest.raises(UsageError, match=rf"labels of shape \({shape[0]},.*\(6,\), or .*\(6, 5\)"):
        measured(torch.randn(6, 5), labels)


def split(multilabel: bool, name: str = "X", **options: Any) -> Split:
    head = ClassificationHead(
        True, torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    )
    images = multilabel_pictures() if multilabel else pictures()
    return Split(name, head, EvalBatches(images, Convolution().val_preprocess, 10), **options)


@both
def test_a_split_with_several_labels_an_image(linear: bool, tmp_path: Any) -> None:
    encoder = Convolution().eval()
    base = linearized(encoder) if linear else encoder
    tau = random_vector(encoder.weights(), size=1.0)
    tau = tau if not linear else {n: tau[n] for n, _ in encoder.named_parameters()}
    own = split(True, cache=tmp_path)
    for _ in range(2):  # the second time from the cache
        swept = own.sweep(base, tau, COEFS)
        images, labels = zip(*own.batches, strict=True)
        truth = torch.cat(labels)
        assert truth.dtype == torch.uint8 and truth.shape == (24, CLASSES)
        for coef, value in zip(COEFS, swept, strict=True):
            moved = linearized(encoder) if linear else Convolution().eval()
            start = encoder.weights()
            moved.load_weights({n: v + coef * tau[n] if n in tau else v for n, v in start.items()})
            with torch.no_grad():
                logits = own.head(moved(torch.cat(images)))
            each = [average_precision_score(truth[:, k], logits[:, k]) for k in range(CLASSES)]
            assert value == pytest.approx(np.mean(each), abs=1e-6)
    assert len(set(swept)) > 1
    assert own.accuracy(base) == {"map": swept[0], "num_images": 24}
    assert len(list(tmp_path.rglob("*.safetensors"))) == (3 if linear else 1)  # f0, tau, 0


def test_other_labels_of_the_same_images_are_not_read_from_the_cache(tmp_path: Any) -> None:
    base = linearized(Convolution().eval())
    one = split(True, cache=tmp_path)
    first = one.accuracy(base)
    batches: Any = one.batches
    other = multilabel_pictures(flipped=True)
    again = Split("X", one.head, EvalBatches(other, batches.transform, 10), cache=tmp_path)
    assert again.accuracy(base) != first
    assert again.accuracy(base) == Split("X", one.head, again.batches).accuracy(base)


@pytest.mark.parametrize("wrong", [6, 4])
def test_labels_of_other_classes_than_the_head_are_refused(wrong: int) -> None:
    images = multilabel_pictures(classes=wrong)
    batches = EvalBatches(images, Convolution().val_preprocess, 10, num_classes=CLASSES)
    with pytest.raises(PictureError, match=rf"labels of shape \({wrong},\), expected shape \(5,\)"):
        list(batches)


def test_sets_of_both_kinds_are_added_and_negated_together() -> None:
    encoder = Convolution().eval()
    tau = random_vector(encoder.weights(), size=1.0)
    tau = {name: value for name, value in tau.items() if "running" not in name}  # variances > 0
    splits = [split(True, "Many"), split(False, "One")]
    swept = sweep_splits(encoder, tau, COEFS, splits)
    assert list(swept[0.4]) == ["Many:map", "One:top1", "One:balanced"]
    found = add(encoder, tau, splits, splits, {"Many": 0.5, "One": 0.5}, COEFS)
    metrics = found["test"]
    mains = [metrics["Many:map"], metrics["One:top1"]]
    assert metrics["avg_top1"] == np.mean(mains)
    assert metrics["Many:normalized_map"] == mains[0] / 0.5
    assert metrics["avg_normalized_top1"] == pytest.approx(np.mean(mains) / 0.5)
    assert "Many:normalized_top1" not in metrics and "One:normalized_balanced" not in metrics
    pair = (splits[0], splits[1])
    negated = negate(encoder, tau, pair, pair, 0.0, COEFS)
    assert negated["test"] == negated["val"][str(negated["coefficient"])]["Many:map"]
    assert negated["test_control"] == negated["val"][str(negated["coefficient"])]["One:top1"]


def test_the_main_metric_is_found_by_its_key() -> None:
    results = {"A:balanced": 0.1, "A:top1": 0.2, "B:map": 0.3}
    assert [main_metric(results, name) for name in "ABC"] == ["top1", "map", None]
    assert normalized({"A:top1": 0.2}, {}) == {"A:top1": 0.2}


def test_one_class_has_no_advantage() -> None:
    assert nonlinear_advantage(1.0, 1.0, 1) == 0.0
    assert nonlinear_advantage(0.5, 0.75, 2) == 0.5


def _evaluate(run: Any) -> None:
    """Evaluates both kinds of set, in every process of a run."""
    torch.manual_seed(0)
    encoder, found = Convolution().eval(), []
    moved = random_vector(encoder.weights(), size=1.0)
    encoder.load_weights({n: v + moved.get(n, 0) for n, v in encoder.weights().items()})
    for base in (encoder, linearized(encoder)):
        for multilabel in (True, False):
            one = split(multilabel)
            batches: Any = one.batches
            share = replace(batches, rank=ddp.rank(), world_size=ddp.world_size())
            found.append(replace(one, batches=share).accuracy(base))
    (Path(str(run.config.save)) / f"{ddp.world_size()}-{ddp.rank()}.json").write_text(
        json.dumps(found)
    )


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        start(_evaluate, Config(save=str(tmp_path), world_size=processes, port=12447))
    alone, *pair = (json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json")))
    assert len(pair) == 2 and pair[0] == pair[1]
    for one, both_ranks in zip(alone, pair[0], strict=True):
        assert both_ranks == pytest.approx(one, abs=1e-6)


def test_logits_that_are_no_numbers_are_no_answers() -> None:
    tally = Tally()
    tally.add(torch.randn(5, CLASSES), torch.arange(5))
    logits = torch.randn(4, CLASSES)
    logits[1, 2] = logits[3, 0] = torch.nan
    tally.add(logits, torch.arange(4))
    for tallies in ([tally], [tally, tally]):
        with pytest.raises(UsageError, match="the logits of 2 of 9 examples are not numbers"):
            scores(tallies)


def test_points_where_a_model_is_not_defined_get_no_right_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    defined, undefined = Tally(), Tally()
    labels = torch.arange(5) % CLASSES
    logits = 9.0 * torch.nn.functional.one_hot(labels, CLASSES)
    defined.add(logits, labels)
    logits[0, 0] = logits[3, 1] = torch.nan  # argmax takes NaN for the largest
    undefined.add(logits, labels)
    both = scores([defined, undefined])
    assert [found["top1"] for found in both] == pytest.approx([1.0, 0.6])
    assert "2 of 5 examples are not numbers" in caplog.text and "at 1 of 2 points" in caplog.text
