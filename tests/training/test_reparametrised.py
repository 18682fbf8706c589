"""Adapters and masked weights in training: dense weights, exact resume, several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.arithmetic.sweeps import logits_at
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, TaskVector
from tangent_arithmetic.data.unlabelled import Unlabelled
from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.linearized import LinearizedEncoder, linearized
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.launch import start
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.checkpoints import read_checkpoint
from tangent_arithmetic.training.loop import TrainingData, penalty_gradient, train
from tangent_arithmetic.training.lora import LowRank
from tangent_arithmetic.training.objectives import OBJECTIVES, CrossEntropy, Objective, Setting
from tangent_arithmetic.training.objectives.taujp import TauJp
from tangent_arithmetic.training.reparametrised import Part, parts_of, reparametrise, theta_of
from tests.training.selections import KINDS, Attending, classifier, encoder, move, some_masks
from tests.training.test_orthoreg import trained as with_orthoreg
from tests.training.tiny import CPU, RECIPE, Tiny, continues_exactly, pictures, to_tensor

STRONG = replace(RECIPE, wd=0.5)


def trained(linear: bool, how: str, **options: Any) -> dict[str, Tensor]:
    model = classifier(linear, how)
    train(model, TrainingData(pictures(0), to_tensor), STRONG, **options)
    assert isinstance(model.image_encoder, torch.nn.Module)
    weights = model.image_encoder.weights()  # type: ignore[operator]
    return {name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize(("linear", "how"), KINDS)
def test_before_the_first_step_features_and_weights_are_those_of_the_encoder(
    linear: bool, how: str
) -> None:
    made, images = encoder(linear, how).eval(), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(made(images), Attending().eval()(images), rtol=0, atol=1e-6)
    before = Attending().weights()
    assert made.weights().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in made.weights().items())


@pytest.mark.parametrize(("linear", "how"), KINDS)
def test_features_are_those_of_the_dense_weights(linear: bool, how: str) -> None:
    made, images = encoder(linear, how).eval(), torch.randn(3, 3, 4, 4)
    move(made)
    dense: Any = linearized(Attending()) if linear else Attending()
    dense.eval().load_weights(made.weights())
    torch.testing.assert_close(made(images), dense(images))
    apart = max((made.weights()[n] - v).abs().max() for n, v in Attending().weights().items())
    assert apart > 0.1


@pytest.mark.parametrize(("linear", "how"), KINDS)
def test_what_is_not_selected_stays_as_it_is_bit_by_bit(linear: bool, how: str) -> None:
    before, after = Attending().weights(), trained(linear, how)
    masks = some_masks(Attending())
    for name, value in after.items():
        if how == "talos":
            assert torch.equal(value[~masks[name]], before[name][~masks[name]])
            assert torch.equal(value, before[name]) != bool(masks[name].any())
        else:  # biases and norms have no adapters
            matrix = name.endswith("weight") and not name.startswith("norm")
            assert torch.equal(value, before[name]) != matrix


@pytest.mark.parametrize(("linear", "how"), KINDS)
def test_a_checkpoint_holds_dense_weights(linear: bool, how: str, tmp_path: Path) -> None:
    made = encoder(linear, how)
    move(made)
    made.save(tmp_path / "x.safetensors", task="X")
    plain = linearized(Attending()) if linear else Attending()
    plain.load_weights(made.weights())
    plain.save(tmp_path / "y.safetensors", task="X")
    one, other = (read_checkpoint(tmp_path / f"{name}.safetensors") for name in "xy")
    assert one is not None and other is not None
    assert (one.kind, one.hash, one.theta0_hash) == (other.kind, other.hash, other.theta0_hash)
    assert one.info == other.info
    if linear:
        vector = LinearizedTaskVector(Attending(), made).vector
        assert isinstance(made, LinearizedEncoder)
        expected = made.displacement()
        assert all(torch.equal(vector[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("linear", "how"), KINDS)
def test_an_interrupted_run_continues_exactly(linear: bool, how: str, tmp_path: Path) -> None:
    continues_exactly(functools.partial(trained, linear, how), tmp_path)


def by_kind() -> dict[str, dict[str, Tensor]]:
    found = {str(kind): trained(*kind) for kind in KINDS}
    return found | {f"orthoreg {linear}": with_orthoreg(2.0, linear) for linear in (False, True)}


def _in_two_processes(args: Any) -> None:
    torch.save(by_kind(), Path(args.config.save) / f"{ddp.rank()}.pt")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    start(_in_two_processes, Config(save=str(tmp_path), world_size=2, port=12421))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for kind, alone in by_kind().items():
        one, other = (rank[kind] for rank in ranks)
        for name, value in alone.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)
            assert torch.equal(one[name], other[name])


def objectives(model: ImageClassifier) -> Mapping[str, Objective]:
    others = Unlabelled({"a": pictures(5, 6)}, to_tensor, 4)
    made = {"orthoreg": OBJECTIVES["orthoreg"](Setting(RECIPE, model=model))}
    linear = isinstance(model.image_encoder, LinearizedEncoder)
    return made | ({"taujp": TauJp(CrossEntropy(), 3.0, others)} if linear else {})


@pytest.mark.parametrize(("linear", "how"), KINDS)
def test_gradients_of_penalties_are_those_of_the_dense_weights(linear: bool, how: str) -> None:
    model = classifier(linear, how)
    loss = objectives(model)  # made at the start, as in a run
    move(model)
    dense = Attending()
    head = model.classification_head
    whole = ImageClassifier(linearized(dense) if linear else dense, head)
    dense_loss = objectives(whole)
    whole.image_encoder.load_weights(model.image_encoder.weights())  # type: ignore[operator]
    _, parts = parts_of(model.image_encoder)
    trained_names = parts.keys()
    for name, parameter in theta_of(whole.image_encoder).items():
        parameter.requires_grad_(name in trained_names)
    for name in loss:
        model.zero_grad()
        whole.zero_grad()
        value = penalty_gradient(model, 0, loss[name], CPU)
        assert value == pytest.approx(penalty_gradient(whole, 0, dense_loss[name], CPU), rel=1e-5)
        assert value is not None and value > 0
        for weight, gradient in theta_of(whole.image_encoder).items():
            if weight not in parts or gradient.grad is None:
                continue
            g, part = gradient.grad, parts[weight]
            if isinstance(part, LowRank):
                expected, found = 2.0 * g.flatten(1) @ part.a.T, part.b.grad
            else:
                mask = some_masks(Attending())[weight]
                expected, found = g[mask], part.get_parameter("entries").grad
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_adapters_are_computed_in_full_precision_under_autocast() -> None:
    made = encoder(False, "lora")
    move(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = theta_of(made)
    for name, value in theta_of(made).items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="expected weights of the encoder, got nose"):
        reparametrise(Tiny(), {"nose": Part()})
    moved = linearized(Attending())
    move(moved)
    with pytest.raises(ValueError, match="expected a linearised module at theta0, got another"):
        reparametrise(moved, {})
    assert parts_of(Tiny())[1] == parts_of(linearized(Tiny()))[1] == {}


def swept(made: Any, tau: TaskVector) -> None:
    batch = torch.ones(2, 3, 4, 4), torch.zeros(2)
    list(logits_at(made, [[(1.0, tau.vector)]], nn.Identity(), [batch]))


WRITES: dict[str, tuple[bool, Callable[[Any, TaskVector], Any]]] = {
    "load_weights": (False, lambda made, _: made.load_weights(Attending().weights())),
    "load_weights, linear": (True, lambda made, _: made.load_weights(Attending().weights())),
    "apply_to": (False, lambda made, tau: tau.apply_to(made)),
    "apply_to_linear": (True, lambda made, tau: tau.apply_to_linear(made)),
    "a sweep": (False, swept),
}


@pytest.mark.parametrize(("linear", "write"), WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("how", ["lora", "talos"])
def test_weights_that_are_computed_from_others_are_not_set(
    linear: bool, write: Callable[[Any, TaskVector], Any], how: str
) -> None:
    tau = TaskVector(vector={"out.weight": torch.ones(4, 8)})
    with pytest.raises(UsageError, match=r"copies of \d+, .* before they are reparametrised"):
        write(encoder(linear, how), tau)


class Tied(Tiny):
    """A model with one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        self.net = nn.Sequential(*self.net, first, nn.Tanh(), second)


def test_a_tied_weight_is_edited_under_all_its_names() -> None:
    part = LowRank(torch.Size((4, 4)), 2, torch.Generator().manual_seed(0))
    made = reparametrise(Tied(), {"net.4.weight": part})
    move(made)
    weights = made.weights()
    assert torch.equal(weights["net.4.weight"], weights["net.6.weight"])
    assert not torch.equal(weights["net.4.weight"], Tied().weights()["net.4.weight"])
    plain = Tied()
    plain.load_weights(weights)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(plain.eval()(images), made.eval()(images))
