"""The penalty of tau-Jp against explicit Jacobians, exact resume, and several processes."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.training.loop import (
    TrainingData,
    penalty_gradient,
    step_gradients,
    train,
    wrap_ddp,
)
from tangent_arithmetic.training.objectives import OBJECTIVES, CrossEntropy, Objective, Setting
from tangent_arithmetic.training.objectives.taujp import Norm, TauJp, linear_encoder, tangent_size
from tests.training.tiny import (
    CPU,
    RECIPE,
    Tiny,
    classifier,
    continues_exactly,
    interference,
    pictures,
    ranks_equal,
    to_tensor,
)

NORMS: tuple[Norm, ...] = ("relative", "squared", "plain")


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


SIZES: dict[Norm, float] = {"relative": 2.0, "squared": 50.0, "plain": 50.0**0.5}


@pytest.mark.parametrize(("norm", "size"), SIZES.items())
def test_an_image_without_features_has_no_size_and_no_gradient(norm: Norm, size: float) -> None:
    f0, d = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    sizes = tangent_size(f0, d.requires_grad_(), norm)
    torch.testing.assert_close(sizes, torch.tensor([0.0, size]))
    sizes.sum().backward()
    assert d.grad is not None and not d.grad[0].any() and bool(d.grad[1].all())


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


def test_a_larger_weight_leaves_less_on_other_images() -> None:
    found = [interference(trained(weight)) for weight in (0.0, 3.0, 300.0)]
    assert found[0] > 2 * found[1] > 3 * found[2] > 0


def test_an_interrupted_run_continues_exactly_and_logs_the_penalty(tmp_path: Path) -> None:
    straight = continues_exactly(functools.partial(trained, 2.0), tmp_path)
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
    ranks_equal(tmp_path, {"gradients": gradients(), "weights": trained(2.0)})


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
    assert isinstance(default, TauJp) and (default.weight, default.norm) == (7.0, "relative")
    with contextlib.closing(default):
        default.others.batch(0)
