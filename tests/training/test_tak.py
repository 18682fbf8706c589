"""The penalty of TAK against a dense quadratic form, exact resume, and several processes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.training.factors import Factors, Settings, collect
from tangent_arithmetic.training.loop import (
    TrainingData,
    penalty_gradient,
    step_gradients,
    train,
    wrap_ddp,
)
from tangent_arithmetic.training.objectives import OBJECTIVES, CrossEntropy, Setting
from tangent_arithmetic.training.objectives.tak import Tak
from tangent_arithmetic.training.objectives.taujp import linear_encoder
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

TRUNCATED = Settings(rank=3, directions=4)


def images() -> Tensor:
    torch.manual_seed(4)
    return torch.stack([to_tensor(pictures(5, 6)[i][0]) for i in range(6)])


def linear_of(model: ImageClassifier) -> LinearizedModel:
    return linear_encoder(model).model


def factors(settings: Settings = TRUNCATED) -> Factors:
    return collect(Tiny(), images(), settings)


def objective(weight: float = 2.0, settings: Settings = TRUNCATED) -> Tak:
    return Tak(CrossEntropy(0.1), weight, factors(settings))


def dense(found: Factors) -> Tensor:
    """G as a dense matrix over all parameters, a column a unit vector."""
    shapes = {n: s for b in found.blocks for n, s in zip(b.names, b.shapes, strict=True)}
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = zip(shapes, unit.split(sizes), strict=True)
        product = found.product({n: part.reshape(shapes[n]) for n, part in parts})
        columns.append(torch.cat([product[n].flatten() for n in shapes]))
    return torch.stack(columns)


@pytest.mark.parametrize(
    "settings",
    [
        Settings("diag"),
        Settings("kfac", rank=3, directions=0),
        TRUNCATED,
        Settings(rank=100, directions=0),
        Settings(rank=100, directions=100),
    ],
)
def test_value_and_gradient_are_those_of_the_dense_quadratic_form(settings: Settings) -> None:
    loss, model = objective(settings=settings), classifier(0.3).double()
    loss.factors = loss.factors.to(torch.float64)
    matrix = dense(loss.factors)
    torch.testing.assert_close(matrix, matrix.mT, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-10
    linear = linear_of(model)
    names = [name for block in loss.factors.blocks for name in block.names]
    tau = torch.cat([(linear.theta()[n] - linear.theta0()[n]).detach().flatten() for n in names])
    value = penalty_gradient(model, 0, loss, CPU)
    assert value == pytest.approx(2.0 * float(tau @ matrix @ tau), rel=1e-9)
    gradients = torch.cat([linear.get_parameter(n).grad.flatten() for n in names])  # type: ignore[union-attr]
    torch.testing.assert_close(gradients, 4.0 * matrix @ tau, rtol=1e-8, atol=1e-11)


def test_with_all_directions_it_is_the_relative_penalty_of_taujp_on_the_images() -> None:
    model = classifier(0.3).double()
    exact = Settings(rank=100, directions=1000, probes=0, shrinkage=0.0)
    loss = Tak(CrossEntropy(), 1.0, collect(Tiny().double(), images().double(), exact))
    f0, d = linear_of(model).primal_and_tangent(images().double())
    expected = (d.square().sum(1) / f0.square().sum(1)).mean()
    value = loss.penalty(model, 0)
    assert value is not None
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)


def test_at_theta0_the_penalty_and_its_gradient_are_zero() -> None:
    model = classifier()
    assert penalty_gradient(model, 0, objective(), CPU) == 0.0
    for parameter in model.image_encoder.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_frozen_parameters_have_no_penalty() -> None:
    whole, model = classifier(0.3), classifier(0.3)
    for name, parameter in linear_of(model).named_parameters():
        parameter.requires_grad_("3" in name)
    first, second = (objective().penalty(m, 0) for m in (whole, model))
    assert first is not None and second is not None
    assert 0 < second.item() < first.item()
    second.backward()
    for name, parameter in linear_of(model).named_parameters():
        assert (parameter.grad is not None) == ("3" in name)
    model.requires_grad_(False)
    assert objective().penalty(model, 0) is None


def test_the_penalty_is_in_float32_under_autocast() -> None:
    plain = penalty_gradient(classifier(0.3), 0, objective(), CPU)
    cast = penalty_gradient(classifier(0.3), 0, objective(), Compute(CPU.device, "bf16"))
    assert cast == plain


def trained(weight: float, settings: Settings = TRUNCATED, **options: Any) -> dict[str, Tensor]:
    model, data = classifier(), TrainingData(pictures(0), to_tensor)
    train(model, data, RECIPE, objective=objective(weight, settings), **options)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_larger_weight_leaves_less_on_other_images() -> None:
    full = Settings(rank=100, probes=8)
    found = [interference(trained(weight, full)) for weight in (0.0, 3.0, 300.0)]
    assert found[0] > 2 * found[1] > 4 * found[2] > 0


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


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    start(_in_two_processes, Config(save=str(tmp_path), world_size=2, port=12417))
    ranks_equal(tmp_path, {"gradients": gradients(), "weights": trained(2.0)})


def test_it_needs_a_linear_model_factors_and_the_relative_norm() -> None:
    plain = ImageClassifier(Tiny(), ClassificationHead(True, torch.randn(3, 4)))
    with pytest.raises(TypeError, match="LinearizedEncoder, got a Tiny; choose --finetuning-mode"):
        objective().penalty(plain, 0)
    with pytest.raises(ValueError, match="expected factors of other data sets"):
        OBJECTIVES["tak"](Setting(RECIPE))
    with pytest.raises(UsageError, match="--penalty-norm=plain: TAK's penalty is relative"):
        OBJECTIVES["tak"](Setting(RECIPE, options={"penalty_norm": "plain"}))


def test_a_setting_decides_weight_and_factors() -> None:
    kept = factors()
    made = OBJECTIVES["tak"](Setting(RECIPE, penalty=3.0, files={"factors": kept}.__getitem__))
    assert isinstance(made, Tak) and made.weight == 3.0 and made.factors is kept
    default = OBJECTIVES["tak"](Setting(RECIPE, files={"factors": kept}.__getitem__))
    assert isinstance(default, Tak) and default.weight > 0


def test_factors_of_another_model_are_refused() -> None:
    other = collect(nn.Linear(48, 4), torch.randn(3, 48), TRUNCATED)
    with pytest.raises(UsageError, match=r"of other parameters[^$]*only in the second: bias"):
        Tak(CrossEntropy(), 1.0, other).penalty(classifier(0.3), 0)
