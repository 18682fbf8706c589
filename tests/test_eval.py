from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from src.args import Config
from src.errors import UsageError
from src.eval import (
    add_normalized_accuracy,
    coefficients,
    eval_single_dataset,
    evaluate,
    evaluate_task_vector,
    evaluate_task_vector_at_coef,
    find_optimal_coef,
    nonlinear_advantage,
    sweep_dataset,
)
from src.linearize import LinearizedImageEncoder
from src.modeling import ImageEncoder
from src.task_vectors import LinearizedTaskVector, NonLinearTaskVector
from tests.small_suite import small_config, small_suite

COEFS = [0.0, 0.4, 1.0]


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    with small_suite(monkeypatch):
        yield small_config(tmp_path)


def random_vector(encoder: ImageEncoder, size: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: size * value.abs().mean() * torch.randn(value.shape, generator=generator)
        for name, value in encoder.weights().items()
    }


@pytest.mark.parametrize("linear", [False, True])
def test_a_sweep_gives_what_single_evaluations_give(args: Config, linear: bool) -> None:
    encoder = ImageEncoder(args)
    kind = LinearizedTaskVector if linear else NonLinearTaskVector
    vector = kind(vector=random_vector(encoder))
    base = LinearizedImageEncoder(image_encoder=encoder) if linear else encoder
    before = {name: value.clone() for name, value in base.weights().items()}
    swept = sweep_dataset(base, vector.vector, COEFS, "EmojiVal", args)
    for name, value in base.weights().items():
        assert torch.equal(value, before[name])
    singles = [
        eval_single_dataset(vector.apply_to(encoder, coef), "EmojiVal", args)["top1"]
        for coef in COEFS
    ]
    assert swept == pytest.approx(singles)
    assert len(set(swept)) > 1  # the vector does something


def test_a_linear_sweep_starts_at_theta_not_at_theta0(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = LinearizedTaskVector(vector=random_vector(encoder))
    moved = vector.apply_to(encoder, 0.6)
    found = sweep_dataset(moved, vector.vector, [-0.6, 0.0, 0.4], "EmojiVal", args)
    start = LinearizedImageEncoder(image_encoder=encoder)
    assert found == pytest.approx(
        sweep_dataset(start, vector.vector, [0.0, 0.6, 1.0], "EmojiVal", args)
    )


def test_post_hoc_at_zero_is_zero_shot(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = NonLinearTaskVector(vector=random_vector(encoder))
    args.eval_datasets = ["Emoji"]
    zeroshot = evaluate(encoder, args)
    posthoc = evaluate_task_vector_at_coef(vector, encoder, args, 0.0, posthoc_linearization=True)
    assert posthoc["Emoji:top1"] == zeroshot["Emoji:top1"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        difference = vector.apply_to_linear(encoder, 0.0)(images) - encoder(images)
    assert difference.abs().max() < 1e-5


def test_the_control_set_is_evaluated_too_but_not_averaged(args: Config) -> None:
    encoder = ImageEncoder(args)
    vector = NonLinearTaskVector(vector=random_vector(encoder))
    args.eval_datasets, args.control_dataset = ["EmojiVal"], "ShapesVal"
    args.finetuning_accuracies = {"EmojiVal": 0.5}
    found = evaluate_task_vector(vector, encoder, args)
    assert list(found) == ["0.0", "0.5", "1.0"]
    metrics = found["0.5"]
    assert metrics["avg_top1"] == metrics["EmojiVal:top1"]
    assert metrics["EmojiVal:normalized_top1"] == pytest.approx(metrics["EmojiVal:top1"] / 0.5)
    assert "ShapesVal:top1" in metrics and "ShapesVal:normalized_top1" not in metrics


def test_every_image_counts_once(args: Config) -> None:
    encoder = ImageEncoder(args)
    assert eval_single_dataset(encoder, "Emoji", args)["num_images"] == 48
    args.batch_size = 7
    assert eval_single_dataset(encoder, "EmojiVal", args)["num_images"] == 40


def test_a_data_set_of_another_suite_is_refused(args: Config) -> None:
    with pytest.raises(UsageError, match="unknown data set of suite embedded 'Cars'"):
        eval_single_dataset(ImageEncoder(args), "Cars", args)


def test_coefficients_are_short_decimals() -> None:
    assert [str(c) for c in coefficients(21)][:5] == ["0.0", "0.05", "0.1", "0.15", "0.2"]
    assert str(coefficients(21)[6]) == "0.3" and coefficients(21)[-1] == 1.0


def test_ties_go_to_the_smallest_coefficient() -> None:
    results = {"1.0": {"m": 0.5}, "0.05": {"m": 0.5}, "0.15000000000000002": {"m": 0.4}}
    assert find_optimal_coef(results, metric="m") == 0.05
    assert find_optimal_coef(results, metric="m", minimize=True) == 0.15000000000000002


def test_the_control_metric_limits_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    results = {0.0: {"m": 30.0, "c": 0.9}, 0.5: {"m": 20.0, "c": 0.86}, 1.0: {"m": 1.0, "c": 0.1}}

    def choose(least: float) -> float:
        return find_optimal_coef(results, "m", True, "c", least)

    assert choose(0.85) == 0.5 and choose(0.0) == 1.0
    assert not caplog.records
    assert choose(0.95) == 0.0
    assert "no coefficient keeps c at 0.95" in caplog.text


def test_all_zero_metrics_still_give_a_coefficient() -> None:
    assert find_optimal_coef({"0.5": {"m": 0.0}}, metric="m") == 0.5


def test_normalised_accuracy_is_averaged_over_tasks() -> None:
    args = Config(finetuning_accuracies={"A": 0.8, "B": 0.5, "C": 0.1})
    found = add_normalized_accuracy({"A:top1": 0.4, "B:top1": 0.5}, args)
    assert found["avg_normalized_top1"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["avg_top1"] == pytest.approx(0.45)


def test_nonlinear_advantage_by_hand() -> None:
    # error rates 0.3 and 0.1 with 5 classes: 0.2 / 0.8
    assert nonlinear_advantage(0.7, 0.9, 5) == pytest.approx(0.25)
