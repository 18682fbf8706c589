"""Calls with other weights, of modules that share weights or are registered twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.linearized import LinearizedModel


def twice() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.BatchNorm1d(4)).eval()


def shared() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.BatchNorm1d(4)).eval()


@pytest.mark.parametrize("module", [twice(), shared()], ids=["twice", "shared"])
def test_a_module_is_as_before_and_computes_with_the_weights_given(module: nn.Module) -> None:
    before = {name: (value, value.clone()) for name, value in module.named_parameters()}
    mean = torch.full((4,), 0.5)
    moved = {name: value + 1 for name, (_, value) in before.items()} | {"3.running_mean": mean}
    inputs = torch.randn(3, 4)
    for _ in range(2):
        found = functional_call(module, moved, (inputs,))
        weight = moved["0.weight"]
        inner = torch.tanh(inputs @ weight.T + moved["0.bias"])
        bias = moved.get("2.bias", moved["0.bias"])
        out = inner @ weight.T + bias
        scale = moved["3.weight"] / (1 + 1e-5) ** 0.5
        expected = (out - mean) * scale + moved["3.bias"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for name, value in module.named_parameters():
            assert value is before[name][0] and torch.equal(value, before[name][1])
        assert not module.get_buffer("3.running_mean").any()


def test_other_weights_leave_theta0_of_a_linear_model() -> None:
    model = LinearizedModel(twice())
    theta0 = {name: value.clone() for name, value in model.theta0().items()}
    model.func0([2 * value for value in model.params0], torch.randn(3, 4))
    for name, value in model.theta0().items():
        assert torch.equal(value, theta0[name])
