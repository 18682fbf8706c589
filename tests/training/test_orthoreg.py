"""OrthoReg against its definition, and trained parameters by choice."""

from __future__ import annotations

import pytest
import torch

from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.training.loop import penalty_gradient
from tangent_arithmetic.training.objectives import OBJECTIVES, Setting
from tangent_arithmetic.training.objectives.orthoreg import defect
from tangent_arithmetic.training.trainable import train_only
from tests.training.test_taujp import CPU, RECIPE, Tiny, classifier


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


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("all", {"net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"}),
        ("norm_and_bias", {"net.1.bias", "net.3.bias"}),
        (r"^net\.3", {"net.3.weight", "net.3.bias"}),
    ],
)
def test_a_choice_is_a_name_or_a_regular_expression(which: str, names: set[str]) -> None:
    model = Tiny()
    train_only(model, which)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_a_choice_of_nothing_is_refused_with_names() -> None:
    with pytest.raises(UsageError, match=r"matches none of the 4 .* such as net.1.weight"):
        train_only(Tiny(), "lora:8")
    with pytest.raises(UsageError, match=r"expected all, .* or a regular expression, got '\('"):
        train_only(Tiny(), "(")
