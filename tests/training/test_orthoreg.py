"""OrthoReg against its definition, and exact resume; test_reparametrised has two processes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tangent_arithmetic.encoders.classifiers import ImageClassifier
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.training.loop import TrainingData, penalty_gradient, train
from tangent_arithmetic.training.objectives import OBJECTIVES, Setting
from tangent_arithmetic.training.objectives.orthoreg import defect, matrix
from tangent_arithmetic.training.trainable import train_only
from tests.training.tiny import (
    CPU,
    RECIPE,
    Tiny,
    classifier,
    continues_exactly,
    pictures,
    to_tensor,
)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 3)])
def test_the_defect_is_that_of_the_smaller_side(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    step = torch.randn(shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(step.flatten(1))
    torch.testing.assert_close(defect(step), (singular**2 - 1).square().sum())
    assert defect(torch.linalg.qr(step.flatten(1).T if shape[0] < 5 else step)[0]) < 1e-20


def test_penalty_and_gradient_are_those_of_the_displacement() -> None:
    model = classifier(0.3).double()
    objective = OBJECTIVES["orthoreg"](Setting(RECIPE, model=model, penalty=2.0))
    value = penalty_gradient(model, 0, objective, CPU)
    tau = model.image_encoder.displacement()  # type: ignore[operator]
    matrices = {n: t.clone().requires_grad_() for n, t in tau.items() if t.ndim == 2}
    expected = 2.0 * sum((defect(t) for t in matrices.values()), torch.zeros(()))
    assert value is not None and value == pytest.approx(expected.item(), rel=1e-12) and value > 0
    gradients = torch.autograd.grad(expected, list(matrices.values()))
    found = {n.removeprefix("image_encoder.model."): p.grad for n, p in model.named_parameters()}
    for name, gradient in zip(matrices, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    assert all(found[n] is None for n, t in tau.items() if t.ndim == 1)


def trained(weight: float, linear: bool = True, **options: Any) -> dict[str, Tensor]:
    model = classifier() if linear else plain()
    setting = Setting(RECIPE, model=model, penalty=weight)
    loss = OBJECTIVES["orthoreg"](setting)
    train(model, TrainingData(pictures(0), to_tensor), RECIPE, objective=loss, **options)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def plain() -> ImageClassifier:
    torch.manual_seed(1)
    model = ImageClassifier(Tiny(), ClassificationHead(True, torch.randn(3, 4)))
    model.freeze_head()
    return model


def test_a_standard_model_is_compared_with_its_start() -> None:
    model = plain().double()
    objective = OBJECTIVES["orthoreg"](Setting(RECIPE, model=model, penalty=2.0))
    identities = 4 + 6  # at the start no column has length 1
    assert penalty_gradient(model, 0, objective, CPU) == pytest.approx(2.0 * identities)
    with torch.no_grad():
        matrix = model.get_parameter("image_encoder.net.3.weight")
        matrix.add_(torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0].T)
    assert penalty_gradient(model, 0, objective, CPU) == pytest.approx(2.0 * 6)


def test_without_a_trained_matrix_there_is_no_penalty() -> None:
    model = plain()
    train_only(model.image_encoder, "norm_and_bias")
    assert OBJECTIVES["orthoreg"](Setting(RECIPE, model=model)).penalty(model, 0) is None


def test_a_larger_weight_makes_steps_more_orthonormal() -> None:
    start = dict(classifier().named_parameters())
    names = [name for name, value in start.items() if value.ndim == 2 and value.requires_grad]
    left = [
        sum(float(defect(trained(weight)[name] - start[name].detach())) for name in names)
        for weight in (0.0, 10.0)
    ]
    assert left[1] < left[0]


@pytest.mark.parametrize("linear", [False, True])
def test_an_interrupted_run_continues_exactly(linear: bool, tmp_path: Path) -> None:
    continues_exactly(functools.partial(trained, 2.0, linear), tmp_path)


def test_tokens_and_positions_with_a_leading_one_are_no_matrices() -> None:
    shapes = {(1, 1, 6): False, (1, 5, 6): False, (6,): False, (6, 1): False, (6, 4): True}
    assert {shape: matrix(torch.zeros(shape)) for shape in shapes} == shapes
