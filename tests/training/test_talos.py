"""TaLoS: scores against explicit gradients, nested masks, training under them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training import talos
from tangent_arithmetic.training.loop import TrainingData, seed_step, step_gradients, train
from tangent_arithmetic.training.objectives import CrossEntropy
from tangent_arithmetic.training.schedule import cosine_lr
from tangent_arithmetic.training.talos import (
    least,
    load_masks,
    masks_of,
    restricted,
    save_masks,
    sensitivity,
    used,
)
from tests.training.selections import Attending, some_masks
from tests.training.tiny import RECIPE, pictures, to_tensor

IMAGES = list(torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5)))


def model() -> ImageClassifier:
    torch.manual_seed(1)
    made = ImageClassifier(Attending(), ClassificationHead(True, torch.randn(3, 4)))
    made.freeze_head()
    return made


class Draws:
    """A generator that gives these numbers."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def random(self) -> float:
        return self.numbers.pop(0)


def test_scores_are_squared_gradients_of_the_log_likelihood_of_drawn_labels() -> None:
    made = model().double()
    images = [image.double() for image in IMAGES]
    numbers = [0.01, 0.35, 0.6, 0.99, 0.5, 0.2]
    scores = sensitivity(made, images, Draws(list(numbers)))  # type: ignore[arg-type]
    theta = {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}

    def log_p(weights: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(made, weights, (torch.stack(images),))
        return torch.log(torch.softmax(logits, dim=1))

    with sdpa_kernel(SDPBackend.MATH):
        jacobian, chances = torch.func.jacrev(log_p)(theta), log_p(theta).exp()
    labels = [int((np.cumsum(p.numpy()) < r).sum()) for p, r in zip(chances, numbers, strict=True)]
    assert len(set(labels)) > 1
    assert scores.keys() == theta.keys()
    for name, value in scores.items():
        expected = sum(jacobian[name][i, y] ** 2 for i, y in enumerate(labels))
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-14)
    assert not any(p.grad is not None for p in made.parameters())


class Biased(nn.Module):
    """Logits that are a bias, whatever the image; and a parameter without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.5, 0.3, 0.2]).log())
        self.idle = nn.Parameter(torch.zeros(4))

    def forward(self, images: Tensor) -> Tensor:
        return self.bias.expand(len(images), -1)


def test_labels_are_drawn_from_the_predictions() -> None:
    count = 3000
    images = [torch.zeros(1)] * count
    scores = sensitivity(Biased(), images, np.random.default_rng(0))
    assert scores.keys() == {"bias"}  # a parameter without effect has no score
    p = torch.tensor([0.5, 0.3, 0.2])
    expected = p * (1 - p)  # the variance of an indicator of y
    torch.testing.assert_close(scores["bias"] / count, expected, rtol=0.1, atol=0)


def test_parameters_that_no_image_uses_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert masks_of(Biased(), [torch.zeros(1)] * 3, 0.5).keys() == {"bias"}
    assert caplog.text.count("not used by 3 images, hence not trained: idle") == 1


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [[False, False], [True]]),
        (2, [[True, False], [True]]),  # the first of two equal ones
        (3, [[True, True], [True]]),
    ],
)
def test_the_least_of_all_tensors(count: int, expected: list[list[bool]]) -> None:
    scores = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([1.0])}
    everything = {name: torch.ones_like(value, dtype=torch.bool) for name, value in scores.items()}
    found = least(scores, everything, count)
    assert [mask.tolist() for mask in found.values()] == expected


def test_the_least_are_chosen_among_marked_ones() -> None:
    scores, among = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[False, True]] * 2)
    assert least({"a": scores}, {"a": among}, 1)["a"].tolist() == [[False, True], [False, False]]


def test_masks_narrow_down_by_round_and_depend_on_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []

    def recorded(*args: object) -> talos.Masks:
        rounds.append(least(*args))  # type: ignore[arg-type]
        return rounds[-1]

    monkeypatch.setattr(talos, "least", recorded)
    masks = masks_of(model(), IMAGES, 0.1, seed=0)
    total = sum(p.numel() for p in Attending().parameters())
    counts = [sum(int(mask.sum()) for mask in made.values()) for made in rounds]
    assert counts == [round(total * 0.1 ** (r / 4)) for r in (1, 2, 3, 4)]
    for outer, inner in itertools.pairwise(rounds):
        assert all((inner[name] <= outer[name]).all() for name in inner)
    again, other = (masks_of(model(), IMAGES, 0.1, seed=seed) for seed in (0, 1))
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    assert any(not torch.equal(mask, other[name]) for name, mask in masks.items())


def test_what_is_least_sensitive_has_the_lowest_scores() -> None:
    masks = masks_of(model(), IMAGES, 0.2, rounds=1)
    generator = np.random.default_rng(np.random.SeedSequence((0, talos.STREAM, 0)))
    scores = sensitivity(model(), IMAGES, generator)
    inside = torch.cat([scores[name][mask] for name, mask in masks.items()])
    outside = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert inside.max() <= outside.min() and inside.sum() < 0.01 * outside.sum()


def test_too_small_a_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"talos:1e-06: that is none of \d+ weights"):
        masks_of(model(), IMAGES[:1], 1e-6)


def test_a_file_holds_a_bit_a_weight(tmp_path: Path) -> None:
    masks, path = some_masks(Attending()), tmp_path / "x_masks.safetensors"
    save_masks(path, masks, "abc")
    found = load_masks(path, "abc")
    assert found is not None and found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert load_masks(path, "other") is None and load_masks(tmp_path / "none", "abc") is None
    large = {"a": torch.rand(1000, 800) < 0.1}
    save_masks(path, large, "abc")
    assert 100_000 <= path.stat().st_size < 101_500


def reference(masks: talos.Masks) -> dict[str, Tensor]:
    """AdamW on all weights, whose masked-out entries are put back after each step."""
    made = model()
    params = {n: p for n, p in made.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=RECIPE.lr, weight_decay=RECIPE.wd)
    plan = BatchPlan(12, RECIPE.batch_size, 1, seed=0)
    steps = RECIPE.epochs * plan.steps_per_epoch
    set_rate = cosine_lr(optimizer, [RECIPE.lr], RECIPE.warmup_length, steps)
    batches = iter(train_loader(pictures(0), to_tensor, RankBatches(plan, 0, steps, 0, 1), 0, 3))
    for step in range(steps):
        seed_step(0, step)
        set_rate(step)
        cpu, loss = torch.device("cpu"), CrossEntropy(RECIPE.ls)
        step_gradients(made, plan, step, batches, cpu, loss)
        with torch.no_grad():
            for name, p in params.items():
                assert p.grad is not None
                p.grad *= masks[name.removeprefix("image_encoder.")]
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for name, p in params.items():
                p.copy_(p.where(masks[name.removeprefix("image_encoder.")], start[name]))
    return {name.removeprefix("image_encoder."): p.detach() for name, p in params.items()}


def test_training_is_adamw_on_the_marked_weights() -> None:
    masks = some_masks(Attending())
    torch.manual_seed(1)
    made = ImageClassifier(
        restricted(Attending(), masks), ClassificationHead(True, torch.randn(3, 4))
    )
    made.freeze_head()
    train(made, TrainingData(pictures(0), to_tensor), RECIPE)
    found = made.image_encoder.weights()  # type: ignore[operator]
    expected = reference(masks)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trained == sum(int(mask.sum()) for mask in masks.values())


class Words(ModuleEncoder):
    """An embedding of words, most of which do not occur, and a layer."""

    kind = "words"

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(50, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.out(self.words(inputs).mean(dim=1))
        return features


@pytest.mark.parametrize(
    "scores", [torch.tensor(1.0), torch.tensor([0.0, 2.0]), torch.ones(2, 3, 1)]
)
def test_tensors_of_any_shape_take_part(scores: Tensor) -> None:
    assert used(scores).shape == scores.shape and used(scores).all()


def test_words_that_do_not_occur_are_no_insensitive_weights() -> None:
    torch.manual_seed(0)
    made = ImageClassifier(Words(), ClassificationHead(True, torch.randn(3, 4)))
    made.freeze_head()
    texts = list(torch.randint(5, (6, 3)))
    masks = {n.rpartition("encoder.")[2]: m for n, m in masks_of(made, texts, 0.25).items()}
    words = masks["words.weight"]
    assert not words[5:].any()
    occurring = len(torch.stack(texts).unique()) * 4
    assert sum(int(m.sum()) for m in masks.values()) == round(0.25 * (occurring + 4 * 4 + 4))
