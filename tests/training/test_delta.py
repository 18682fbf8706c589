"""A step of DELTA against formulas in float64, its teacher, exact resume, several processes."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.task_vectors import NonLinearTaskVector
from tangent_arithmetic.commands import finetune
from tangent_arithmetic.data.loading import BatchPlan, RankBatches, train_loader
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.encoders.linearized import LinearizedEncoder, linearized
from tangent_arithmetic.encoders.loading import read_facts
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.loop import TrainingData, step_gradients, train, wrap_ddp
from tangent_arithmetic.training.objectives import (
    OBJECTIVES,
    BinaryCrossEntropy,
    CrossEntropy,
    Setting,
)
from tangent_arithmetic.training.objectives.delta import Delta, between, check_student
from tangent_arithmetic.training.objectives.taujp import Norm
from tests.small_suite import flags, small_suite
from tests.training.selections import classifier
from tests.training.tiny import RECIPE, Tiny, continues_exactly, pictures, ranks_equal, to_tensor

Weights = dict[str, Tensor]
NORMS: tuple[Norm, ...] = ("relative", "squared", "plain")


def teacher(moved: float = 0.3) -> LinearizedEncoder:
    """A linear model, `moved` away from theta0."""
    encoder = linearized(Tiny())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    assert isinstance(encoder, LinearizedEncoder)
    return encoder


def student(moved: float = 0.0) -> ImageClassifier:
    """A standard model, `moved` away from theta0, with a frozen head."""
    encoder = Tiny()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    model = ImageClassifier(encoder, ClassificationHead(True, torch.randn(3, 4)))
    model.freeze_head()
    return model


def delta(weight: float = 2.0, norm: Norm = "relative", draws: int = 1, seed: int = 0) -> Delta:
    return Delta(CrossEntropy(0.1), weight, teacher(), (0.5, 1.0), draws, norm, seed)


def mlp(theta: Weights, x: Tensor) -> Tensor:
    """The features of `Tiny` as a formula."""
    z = x.flatten(1) @ theta["net.1.weight"].T + theta["net.1.bias"]
    hidden = z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return hidden @ theta["net.3.weight"].T + theta["net.3.bias"]


def entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    q = (1 - smoothing) * hot + smoothing / logits.shape[1]
    return -(q * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1)


def affine(model: LinearizedEncoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """f0 and J tau, from an explicit Jacobian in float64."""
    theta0 = {name: value.double() for name, value in model.theta0().items()}
    tau = {n: v.detach().double() - theta0[n] for n, v in model.model.theta().items()}
    jacobian = torch.func.jacrev(lambda theta: mlp(theta, x))(theta0)
    terms = [torch.einsum("nfp,p->nf", jacobian[n].flatten(2), tau[n].flatten()) for n in tau]
    return mlp(theta0, x), torch.stack(terms).sum(0)


def reference(
    model: ImageClassifier, loss: Delta, x: Tensor, labels: Tensor, alphas: list[float]
) -> tuple[Tensor, Weights]:
    """The losses of a step, and the gradient of their sum, with respect to tau_S."""
    theta0 = {name: value.double() for name, value in loss.teacher.theta0().items()}
    tau = {
        name: (value.detach() - theta0[name]).requires_grad_()
        for name, value in model.image_encoder.named_parameters()
    }
    f0, d = affine(loss.teacher, x)

    def features(coef: float) -> Tensor:
        return mlp({name: theta0[name] + coef * tau[name] for name in tau}, x)

    phi = features(1.0)
    head = model.classification_head.get_parameter("weight")
    logits = phi / phi.square().sum(1, keepdim=True).sqrt() @ head.T
    losses = entropy(logits, labels, 0.1)
    for alpha in alphas:
        squares = (features(alpha) - f0 - alpha * d).square().sum(1)
        size = {
            "plain": squares.sqrt(),
            "squared": squares,
            "relative": squares / f0.square().sum(1),
        }[loss.norm]
        losses = losses + loss.weight * size / len(alphas)
    return losses, dict(zip(tau, torch.autograd.grad(losses.sum(), [*tau.values()]), strict=True))


def batch(count: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(count, 3, 4, 4, dtype=torch.float64), torch.arange(count) % 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("draws", [1, 3])
def test_losses_and_gradient_equal_the_formulas(norm: Norm, draws: int) -> None:
    model, loss = student(0.2).double(), delta(norm=norm, draws=draws)
    loss.teacher.double()
    loss = Delta(loss.supervised, 2.0, loss.teacher, (0.5, 1.0), draws, norm)
    (x, labels), step = batch(), 4
    expected, gradient = reference(model, loss, x, labels, loss.coefs(step))
    found = loss.loss(model, (x, labels), step)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found.sum().backward()
    for name, parameter in model.image_encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name], rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in loss.teacher.parameters())


def test_the_teacher_is_affine_in_the_coefficient() -> None:
    linear = teacher().double()
    loss, (x, _) = Delta(CrossEntropy(), 1.0, linear), batch()
    f0, d = loss.affine(x)
    expected = affine(linear, x)
    torch.testing.assert_close((f0, d), expected, rtol=1e-10, atol=1e-12)
    for alpha in (0.0, 0.7, 2.0):
        moved = {name: value + alpha * loss.tau[name] for name, value in loss.theta0.items()}
        linear.load_weights(moved)
        torch.testing.assert_close(linear(x), expected[0] + alpha * expected[1])
        assert (f0 + alpha * d - linear(x)).abs().max() < 1e-12


def test_the_student_at_a_coefficient_is_the_encoder_that_a_task_vector_gives() -> None:
    encoder, linear = Normed(), linearized(Normed())
    assert isinstance(linear, LinearizedEncoder)
    with torch.no_grad():
        for value in encoder.weights().values():
            value.copy_(value + 1 if value.is_floating_point() else value)
    weights = between(linear.weights0(), encoder, 0.5)
    merged = NonLinearTaskVector(Normed(), encoder).apply_to(Normed(), 0.5)
    for name, value in merged.weights().items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[name], value)


def test_frozen_parameters_stay_and_buffers_are_not_written() -> None:
    class Normed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs: Tensor) -> Tensor:
            features: Tensor = self.norm(super().forward(inputs))
            return features

    encoder, (x, labels) = Normed(), batch()
    linear = linearized(Normed())
    assert isinstance(linear, LinearizedEncoder)
    model = ImageClassifier(encoder, ClassificationHead(True, torch.randn(3, 4)))
    model.freeze_head()
    encoder.net.get_submodule("1").requires_grad_(False)
    loss = Delta(CrossEntropy(), 1.0, linear, draws=3)
    with torch.no_grad():
        encoder.net.get_submodule("3").get_parameter("bias").add_(1.0)
    model.train()
    loss.distance(encoder, x.float(), 0).sum().backward()
    assert encoder.norm.num_batches_tracked == 0
    assert not encoder.norm.get_buffer("running_mean").any()
    grads = {name: p.grad is not None for name, p in encoder.named_parameters()}
    assert grads == {name: not name.startswith("net.1") for name in grads}
    assert loss.loss(model, (x.float(), labels), 0).shape == (5,)
    assert encoder.norm.num_batches_tracked == 1  # by the supervised pass alone


def test_coefficients_follow_from_seed_and_step() -> None:
    loss, again, other = delta(draws=4), delta(draws=4), delta(draws=4, seed=1)
    every = [loss.coefs(step) for step in range(500)]
    assert [again.coefs(step) for step in reversed(range(500))] == every[::-1]
    assert other.coefs(0) != every[0] != every[1]
    columns = torch.tensor(every).T
    for i, column in enumerate(columns):  # one in each quarter of [0.5, 1]
        low = 0.5 + i / 8
        assert low <= column.min() < low + 0.01 and low + 0.115 < column.max() < low + 0.125
    assert columns.mean() == pytest.approx(0.75, abs=0.005)


def test_the_mean_of_a_supervised_loss_gets_the_mean_distance() -> None:
    class Mean(CrossEntropy):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
            return super().loss(model, batch, step).mean()

    (x, labels), model = batch(), student(0.2)
    each = delta().loss(model, (x.float(), labels), 1)
    mean = Delta(Mean(0.1), 2.0, teacher()).loss(model, (x.float(), labels), 1)
    torch.testing.assert_close(mean, each.mean())


def trained(weight: float, **options: Any) -> Weights:
    model = student()
    data = TrainingData(pictures(0), to_tensor)
    train(model, data, RECIPE, objective=delta(weight, draws=2), **options)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_larger_weight_brings_the_student_nearer() -> None:
    loss, images = delta(), torch.stack([to_tensor(pictures(0)[i][0]) for i in range(12)])
    found = []
    for weight in (0.0, 300.0):
        model = student()
        model.load_state_dict({**model.state_dict(), **trained(weight)})
        sizes = [loss.distance(model.image_encoder, images, step).mean() for step in range(5)]
        found.append(torch.stack(sizes).mean().item())
    assert found[0] > 1.5 * found[1] > 0


def test_an_interrupted_run_continues_exactly(tmp_path: Path) -> None:
    continues_exactly(functools.partial(trained, 2.0), tmp_path)


def gradients() -> Weights:
    """Of a step in the middle of a run with two micro-steps, this process's share."""
    model, loss = student(0.3), delta(draws=2)
    wrapped, plan = wrap_ddp(model, torch.device("cpu")), BatchPlan(12, 4, 2, seed=0)
    shares = RankBatches(plan, 1, 2, ddp.rank(), ddp.world_size())
    batches = iter(train_loader(pictures(0), to_tensor, shares, 0))
    step_gradients(wrapped, plan, 1, batches, torch.device("cpu"), loss)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _in_two_processes(args: Any) -> None:
    found = {"gradients": gradients(), "weights": trained(2.0)}
    torch.save(found, Path(args.config.save) / f"{ddp.rank()}.pt")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    start(_in_two_processes, Config(save=str(tmp_path), world_size=2, port=ddp.free_port(0)))
    ranks_equal(tmp_path, {"gradients": gradients(), "weights": trained(2.0)})


def test_a_setting_decides() -> None:
    files = {"teacher": teacher()}.__getitem__
    made = OBJECTIVES["delta"](Setting(RECIPE, model=student(), files=files))
    assert isinstance(made, Delta) and (made.weight, made.norm) == (10.0, "relative")
    assert (made.range, made.draws, made.seed) == ((0.5, 1.0), 1, 0)
    options = {"coef_min": 0, "coef_max": 2, "coefs_per_step": 4, "penalty_norm": "plain"}
    own = OBJECTIVES["delta"](
        Setting(RECIPE, True, student(), 3.0, {**options, "seed": 5}, files=files)
    )
    assert isinstance(own, Delta) and isinstance(own.supervised, BinaryCrossEntropy)
    assert (own.weight, own.range, own.draws) == (3.0, (0, 2), 4)
    assert (own.norm, own.seed) == ("plain", 5)


class Wide(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Linear(6, 5)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [(teacher(), "got a linear one to train; choose"), (Wide(), r"net.3.bias: shape \(5,\) ag")],
)
def test_a_student_is_standard_and_like_its_teacher(encoder: nn.Module, message: str) -> None:
    model = ImageClassifier(encoder, ClassificationHead(True, torch.randn(3, 4)))
    with pytest.raises(UsageError, match=message):
        OBJECTIVES["delta"](Setting(RECIPE, model=model, files=lambda name: teacher()))
    with pytest.raises(ValueError, match="expected a student and the files of its teacher"):
        OBJECTIVES["delta"](Setting(RECIPE, model=student()))


def test_a_linear_mode_is_refused() -> None:
    assert MODES["standard+delta"].label == "standard, DELTA"
    with pytest.raises(UsageError, match=r"delta distils .* choose --finetuning-mode=standard"):
        MODES["linear+delta"]
    config = Config(finetuning_mode="standard", objective="delta", coef_min=0.8, coef_max=0.5)
    with pytest.raises(UsageError, match=r"--coef-min=0.8 is above --coef-max=0.5; expected"):
        Run.of(config).check()


def test_a_run_distils_its_linear_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(mode: str, *more: str) -> tuple[int, str]:
        own = [f"--finetuning-mode={mode}", "--train-dataset=Emoji", *flags(tmp_path), *more]
        return finetune.main(own), capsys.readouterr().err

    folder = tmp_path / "checkpoints" / "EmojiVal"
    with small_suite(monkeypatch):
        code, text = run("standard+delta", "--penalty=3", "--coef-max=0.9")
        assert code != 0 and "linear_finetuned" in text
        assert "--finetuning-mode=linear" in text and "--penalty" not in text.split("with:")[1]
        assert run("linear")[0] == 0
        assert run("standard+delta", "--penalty=3", "--coef-max=0.9")[0] == 0
        facts = read_facts(folder / "standard_delta_finetuned.safetensors")
        linear = read_facts(folder / "linear_finetuned.safetensors")
        method = facts["info"]["method"]
        assert facts["kind"] == "image_encoder" and facts["hash"] != linear["hash"]
        assert (method["teacher"], method["teacher_hash"]) == ("linear", linear["hash"])
        assert (method["penalty"], method["coef_min"], method["coef_max"]) == (3.0, 0.5, 0.9)
        assert run("linear+taujp", "--others=Shapes")[0] == 0  # the default from now on
        code, text = run("standard+delta", "--penalty=3", "--coef-max=0.9")
        assert code != 0 and "teacher" in text
        assert run("standard+delta", "--penalty=3", "--coef-max=0.9", "--teacher=linear")[0] == 0
        for name in ("standard", "posthoc"):
            code, text = run("standard+delta", f"--teacher={name}")
            assert code != 0 and "expected a mode that trains a linear model" in text


class Normed(Tiny):
    """A model with a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*self.net, nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_student_and_teacher_agree_at_theta0_whatever_training_does() -> None:
    encoder = Normed().train()
    linear = linearized(Normed())
    assert isinstance(linear, LinearizedEncoder)
    sizes = Delta(CrossEntropy(), 1.0, linear).distance(encoder, torch.randn(5, 3, 4, 4), 0)
    torch.testing.assert_close(sizes, torch.zeros(5), rtol=0, atol=1e-6)
    assert encoder.training and encoder.get_buffer("net.4.num_batches_tracked") == 0


def test_a_student_with_adapters_is_refused() -> None:
    with pytest.raises(UsageError, match="not lora or talos"):
        check_student(classifier(False, "lora").image_encoder, teacher())
