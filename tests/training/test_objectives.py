"""Losses that follow from the labels, and training on small and odd sets."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.average_precision import mean_average_precision
from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import BatchPlan
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.processes import Stopped
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.training.loop import TrainingData, train
from tangent_arithmetic.training.objectives import (
    OBJECTIVES,
    BinaryCrossEntropy,
    CrossEntropy,
    Setting,
    intercepts,
    supervised_of,
)
from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.resume import Snapshots
from tangent_arithmetic.training.small_sets import check_single_images

RECIPE = Recipe(
    lr=1e-2, epochs=2, batch_size=4, num_grad_accumulation=2, warmup_length=3, wd=0.1, ls=0.1
)


def to_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def pictures(labels: np.ndarray) -> ArrayPictures:
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4, 3), dtype=np.uint8)
    return ArrayPictures(images, labels)


def several(images: int = 13, classes: int = 3) -> np.ndarray:
    """Labels of images that have none, one or several each."""
    labels = (np.random.default_rng(1).random((images, classes)) < 0.5).astype(np.uint8)
    labels[0], labels[1] = 0, 1
    return labels


def network(classes: int = 3, shift: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.GELU(), nn.Linear(8, classes))
    with torch.no_grad():
        dict(model.named_parameters())["3.bias"].add_(shift)
    return model


def trained(labels: np.ndarray, recipe: Recipe = RECIPE, **options: Any) -> dict[str, Any]:
    model = options.pop("model", None) or network(labels.shape[1] if labels.ndim == 2 else 3)
    facts = train(model, TrainingData(pictures(labels), to_tensor), recipe, seed=0, **options)
    return {**facts, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    flat_a, flat_b = (torch.cat([v.flatten() for v in s.values()]) for s in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_binary_cross_entropy_is_its_definition(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    labels = torch.from_numpy(several(7))
    objective = BinaryCrossEntropy(smoothing)
    objective.intercepts = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    p = (model(x) + objective.intercepts).sigmoid()
    q = (1 - smoothing) * labels.double() + smoothing / 2
    expected = -(q * p.log() + (1 - q) * (1 - p).log()).mean(dim=1)
    found = objective.loss(model, (x, labels), 0)
    assert found.shape == (7,)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("shift", [0.0, 25.0, -300.0])
def test_intercepts_predict_as_many_labels_as_there_are(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = shift + 3 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    labels = (torch.rand(50, 4, generator=generator, dtype=torch.float64) < 0.3).double()
    labels[:, 0], labels[:, 1] = 0, 1  # none and all of the images
    found = intercepts(logits, labels)
    rates = (labels.sum(dim=0) + 0.5) / 51
    assert found.isfinite().all()
    assert ((logits + found).sigmoid().mean(dim=0) - rates).abs().max() < 1e-12


def test_labels_choose_the_objective() -> None:
    assert type(supervised_of(RECIPE, False)) is CrossEntropy
    found = supervised_of(RECIPE, True)
    assert type(found) is BinaryCrossEntropy and found.label_smoothing == RECIPE.ls
    labels = several()
    given = trained(labels, objective=BinaryCrossEntropy(RECIPE.ls))
    assert distance(trained(labels)["weights"], given["weights"]) == 0.0


@pytest.mark.parametrize("shift", [0.0, 25.0])  # 25: as the logits of a zero-shot head
def test_images_with_several_labels_are_learnt(shift: float) -> None:
    labels, model = several(24), network(shift=shift)
    recipe = replace(RECIPE, lr=3e-2, epochs=40, batch_size=8, warmup_length=0, wd=0.0)
    facts = trained(labels, recipe, model=model)
    images = torch.stack(
        [to_tensor(image) for image, _ in map(pictures(labels).__getitem__, range(24))]
    )
    with torch.no_grad():
        found = mean_average_precision(model(images), torch.from_numpy(labels))
    assert found > 0.95 and facts["last_epoch_loss"] < 0.4


def test_an_interrupted_run_with_several_labels_continues_exactly(tmp_path: Path) -> None:
    labels = several()
    whole = trained(labels)["weights"]

    class Stop(BinaryCrossEntropy):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
            if step == 2:
                raise Stopped(15)
            return super().loss(model, batch, step)

    states = RunStates(tmp_path, {"run": "x"}, every=1)
    with pytest.raises(Stopped):
        trained(labels, objective=Stop(RECIPE.ls), snapshots=Snapshots(states))
    assert distance(trained(labels, snapshots=Snapshots(states))["weights"], whole) == 0.0


@pytest.mark.parametrize(
    ("count", "classes"),
    [(1, 3), (3, 3), (5, 1000)],  # fewer images than a batch, more classes than images
)
@pytest.mark.parametrize("kind", ["one", "several"])
def test_small_sets_train(count: int, classes: int, kind: str) -> None:
    labels = np.arange(count) % classes if kind == "one" else several(max(count, 2), classes)
    found = trained(labels, model=network(classes))
    assert found["steps"] == 2 and np.isfinite(found["last_epoch_loss"])
    assert distance(found["weights"], network(classes).state_dict()) > 0


def test_one_class_has_nothing_to_learn_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    recipe = replace(RECIPE, lr=1e-2, epochs=1, batch_size=4, warmup_length=0, wd=0.0)
    with caplog.at_level(logging.WARNING):
        found = trained(np.zeros(6, np.int64), recipe, model=network(1))
    assert found["last_epoch_loss"] == 0.0
    assert distance(found["weights"], network(1).state_dict()) == 0.0
    assert "there is one class" in caplog.text
    caplog.clear()
    trained(np.arange(6) % 3)
    trained(np.ones((6, 1), np.uint8), recipe, model=network(1))  # with or without the label
    assert "there is one class" not in caplog.text


def normalising(pooled: bool) -> nn.Module:
    """A network with batch normalisation, of single values or of maps."""
    torch.manual_seed(0)
    if pooled:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3))


@pytest.mark.parametrize(
    ("count", "batch_size", "way_out"),
    [
        (13, 4, "use --batch-size=5"),
        (9, 8, "use --batch-size=7"),
        (4, 1, "use --batch-size=2"),
        (2, 1, "use --batch-size=2"),
        (1, 4, "it needs more than 1 training images"),
    ],
)
def test_a_batch_of_one_image_that_cannot_be_normalised_is_refused_at_once(
    count: int, batch_size: int, way_out: str
) -> None:
    labels, model = np.arange(count) % 3, normalising(pooled=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = replace(RECIPE, lr=1e-2, epochs=1, batch_size=batch_size, warmup_length=0)
    with pytest.raises(UsageError, match=f"leaves a single one.*{way_out}"):
        trained(labels, recipe, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trained(labels, recipe, model=normalising(pooled=False))  # has 16 values a channel
    if "use" in way_out:
        size = int(way_out.rpartition("=")[2])
        trained(
            labels,
            replace(RECIPE, lr=1e-2, epochs=1, batch_size=size),
            model=normalising(pooled=True),
        )


def test_processes_that_get_one_image_each_are_noticed() -> None:
    model, image = normalising(pooled=True).train(), torch.zeros(1, 3, 4, 4)
    check_single_images(model, BatchPlan(8, 4, 1, 0), image, world_size=2)
    with pytest.raises(UsageError, match=r"leaves a single one on a process.*--batch-size=4"):
        check_single_images(model, BatchPlan(8, 2, 1, 0), image, world_size=2)
    model.eval()  # uses its running statistics
    check_single_images(model, BatchPlan(8, 2, 1, 0), image, world_size=2)


def _train_in_group(args: Any) -> None:
    found = trained(several())["weights"]
    torch.save(found, Path(str(args.config.save)) / f"rank{ddp.rank()}.pt")


@pytest.mark.slow
def test_two_processes_agree_with_one_on_several_labels(tmp_path: Path) -> None:
    config = Config(save=str(tmp_path), world_size=2, port=ddp.free_port(0))
    start(_train_in_group, config)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert distance(one, two) == 0.0
    assert distance(one, trained(several())["weights"]) < 1e-5


def test_cross_entropy_is_unchanged_by_the_choice() -> None:
    labels = np.arange(13) % 3
    assert (
        distance(
            trained(labels)["weights"], trained(labels, objective=CrossEntropy(0.1))["weights"]
        )
        == 0.0
    )
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    found = CrossEntropy(0.1).loss(nn.Identity(), (x, y), 0)
    assert torch.equal(found, F.cross_entropy(x, y, reduction="none", label_smoothing=0.1))


@pytest.mark.parametrize("multilabel", [False, True])
def test_ascent_is_the_loss_with_its_sign_turned(multilabel: bool) -> None:
    labels = several(4) if multilabel else np.arange(4) % 3
    batch = torch.rand(4, 3, 4, 4), torch.from_numpy(labels)
    objective = OBJECTIVES["ascent"](Setting(RECIPE, multilabel))
    expected = supervised_of(RECIPE, multilabel).loss(network(), batch, 0)
    torch.testing.assert_close(objective.loss(network(), batch, 0), -expected)
    assert objective.penalty(network(), 0) is None
    again = OBJECTIVES["ascent"](Setting(RECIPE, multilabel))
    again.load_state_dict(objective.state_dict())
    torch.testing.assert_close(again.loss(network(), batch, 1), -expected)
    if not multilabel:
        data, ascended = pictures(np.arange(12) % 3), network()
        train(ascended, TrainingData(data, to_tensor), RECIPE, objective=objective)
        images, truth = torch.stack([to_tensor(x) for x in data.images]), torch.arange(12) % 3
        before, after = (F.cross_entropy(model(images), truth) for model in (network(), ascended))
        assert after > before + 0.01
