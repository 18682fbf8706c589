"""The penalty of tau-Jp against explicit Jacobians, exact resume, and several processes."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.data.base import ArrayPictures
from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.base import ModuleEncoder
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import linearized
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.logs import Tracker
from tangent_arithmetic.storage.states import RunStates
from tangent_arithmetic.training.loop import (
    TrainingData,
    penalty_gradient,
    step_gradients,
    train,
    wrap_ddp,
)
from tangent_arithmetic.training.objectives import OBJECTIVES, CrossEntropy, Objective, Setting
from tangent_arithmetic.training.objectives.taujp import Norm, TauJp, linear_encoder, tangent_size
from tangent_arithmetic.training.recipe import Recipe
from tangent_arithmetic.training.resume import Snapshots

RECIPE = Recipe(
    lr=1e-2, epochs=4, batch_size=4, num_grad_accumulation=1, warmup_length=3, wd=0.1, ls=0.1
)
NORMS: tuple[Norm, ...] = ("relative", "squared", "plain")
CPU = Compute(torch.device("cpu"))


class Tiny(ModuleEncoder):
    kind = "tiny_encoder"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.net(inputs)
        return features


def to_tensor(image: Any) -> Tensor:
    """A transform that draws random numbers, as augmentation does."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return x + 0.1 * torch.randn_like(x)


def pictures(seed: int, count: int = 12) -> ArrayPictures:
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return ArrayPictures(images, np.arange(count) % 3)


def classifier(moved: float = 0.0) -> ImageClassifier:
    """A linearised encoder, `moved` away from theta0, with a frozen head."""
    encoder = linearized(Tiny())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    model = ImageClassifier(encoder, ClassificationHead(True, torch.randn(3, 4)))
    model.freeze_head()
    return model


def objective(norm: Norm = "relative", weight: float = 2.0) -> TauJp:
    others = Unlabelled({"a": pictures(5, 6), "b": pictures(6, 8)}, to_tensor, 4)
    return TauJp(CrossEntropy(0.1), weight, others, norm)


def dense(model: ImageClassifier, images: Tensor, norm: Norm) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean size of J tau and its gradient, from an explicit Jacobian in float64."""
    linear = linear_encoder(model).model
    theta0 = {name: value.detach().double() for name, value in linear.theta0().items()}
    tau = {n: (v - theta0[n]).detach().requires_grad_() for n, v in linear.theta().items()}
    skeleton = Tiny().double()

    def features(theta: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(skeleton, theta, (images,))

    jacobian = torch.func.jacrev(features)(theta0)
    d = sum(torch.einsum("nf...,...->nf", jacobian[n].flatten(2), tau[n].flatten()) for n in tau)
    assert isinstance(d, Tensor)
    squares = d.square().sum(1)
    size = {
        "plain": squares.sqrt(),
        "squared": squares,
        "relative": squares / features(theta0).square().sum(1),
    }[norm].mean()
    return size, dict(zip(tau, torch.autograd.grad(size, list(tau.values())), strict=True))


def _given(images: Tensor, step: int) -> Tensor:
    return images


@pytest.mark.parametrize("norm", NORMS)
def test_penalty_and_gradient_equal_those_of_the_explicit_jacobian(norm: Norm) -> None:
    model, loss = classifier(0.3).double(), objective(norm)
    for step in range(3):
        images = loss.others.batch(step).double()
        expected, gradients = dense(model, images, norm)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss.others, "batch", functools.partial(_given, images))
            value = penalty_gradient(model, step, loss, CPU)
        assert value == pytest.approx(2.0 * expected.item(), rel=1e-10)
        for name, parameter in linear_encoder(model).model.named_parameters():
            torch.testing.assert_close(parameter.grad, 2.0 * gradients[name], rtol=1e-9, atol=1e-12)
        model.zero_grad()


@pytest.mark.parametrize("norm", NORMS)
def test_at_theta0_the_penalty_and_its_gradient_are_zero(norm: Norm) -> None:
    model = classifier()
    assert penalty_gradient(model, 0, objective(norm), CPU) == 0.0
    for parameter in model.image_encoder.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_sizes_are_in_float32_for_half_precision() -> None:
    d = torch.full((2, 3), 300.0, dtype=torch.float16)  # its square is no float16
    sizes = tangent_size(torch.ones(2, 3, dtype=torch.float16), d, "squared")
    torch.testing.assert_close(sizes, torch.full((2,), 270000.0))


def trained(weight: float, **options: Any) -> dict[str, Tensor]:
    model = classifier()
    train(
        model,
        TrainingData(pictures(0), to_tensor),
        RECIPE,
        objective=objective(weight=weight),
        **options,
    )
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def interference(weights: dict[str, Tensor]) -> float:
    model = classifier()
    model.load_state_dict({**model.state_dict(), **weights})
    images = torch.stack([to_tensor(pictures(5, 6)[i][0]) for i in range(6)])
    f0, d = linear_encoder(model).model.primal_and_tangent(images)
    return tangent_size(f0, d, "relative").mean().item()


def test_a_larger_weight_leaves_less_on_other_images() -> None:
    found = [interference(trained(weight)) for weight in (0.0, 3.0, 300.0)]
    assert found[0] > 2 * found[1] > 3 * found[2] > 0


class Interrupted(Exception):
    pass


class Recording(Tracker):
    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop, self.seen = stop, list[Any]()

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.seen.append((step, values))
        if step == self.stop:
            raise Interrupted


def test_an_interrupted_run_continues_exactly_and_logs_the_penalty(tmp_path: Path) -> None:
    def states() -> Snapshots:
        return Snapshots(RunStates(tmp_path / "finetuned.safetensors", {}, every=1))

    straight, first, second = Recording(), Recording(5), Recording()
    expected = trained(2.0, tracker=straight)
    with pytest.raises(Interrupted):
        trained(2.0, snapshots=states(), tracker=first)
    found = trained(2.0, snapshots=states(), tracker=second)
    assert first.seen[:5] + second.seen == straight.seen and len(straight.seen) == 12
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert straight.seen[0][1]["penalty"] == 0 < straight.seen[-1][1]["penalty"]


def gradients() -> dict[str, Tensor]:
    """Of a step in the middle of a run, this process's share."""
    model, loss = classifier(0.3), objective()
    wrapped = wrap_ddp(model, torch.device("cpu"))
    plan = BatchPlan(12, 4, 2, seed=0)
    for step in range(2):  # the second meets what the first has left
        model.zero_grad()
        shares = RankBatches(plan, step, step + 1, ddp.rank(), ddp.world_size())
        batches = iter(train_loader(pictures(0), to_tensor, shares, 0))
        penalty_gradient(model, step, loss, CPU)
        step_gradients(wrapped, plan, step, batches, torch.device("cpu"), loss)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _in_two_processes(args: Any) -> None:
    found = {"gradients": gradients(), "weights": trained(2.0)}
    torch.save(found, Path(args.config.save) / f"{ddp.rank()}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    start(_in_two_processes, Config(save=str(tmp_path), world_size=2, port=12409))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = {"gradients": gradients(), "weights": trained(2.0)}
    for found in ranks:
        for kind, expected in alone.items():
            for name, value in expected.items():
                torch.testing.assert_close(found[kind][name], value, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(ranks[0]["weights"][n], v) for n, v in ranks[1]["weights"].items())


def test_it_needs_a_linear_model_and_other_images() -> None:
    plain = ImageClassifier(Tiny(), ClassificationHead(True, torch.randn(3, 4)))
    with pytest.raises(TypeError, match="LinearizedEncoder, got a Tiny; choose --finetuning-mode"):
        objective().penalty(plain, 0)
    with pytest.raises(ValueError, match="expected images of other data sets"):
        OBJECTIVES["taujp"](Setting(RECIPE))


def test_a_setting_decides_weight_and_norm() -> None:
    others = objective().others
    made = OBJECTIVES["taujp"](
        Setting(
            replace(RECIPE, ls=0.0),
            penalty=3.0,
            options={"penalty_norm": "plain"},
            others=lambda: others,
        )
    )
    assert isinstance(made, TauJp) and (made.weight, made.norm) == (3.0, "plain")
    default: Objective = OBJECTIVES["taujp"](Setting(RECIPE, others=lambda: others))
    assert isinstance(default, TauJp) and (default.weight, default.norm) == (10.0, "relative")
    with contextlib.closing(default):
        default.others.batch(0)
