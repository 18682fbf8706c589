"""The check of first calls sees what is wrong, names its place, and leaves all else alone."""

from __future__ import annotations

import logging
import re
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.tangent import check, checking, jvp
from tangent_arithmetic.tangent.canary import EXAMPLES
from tangent_arithmetic.tangent.linearized import LinearizedModel

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class Tripled(torch.autograd.Function):
    """Twice its input, with a forward-mode derivative of 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 3


class Wrong(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Tripled.apply(super().forward(x))
        return out


class Stops(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.from_numpy(y.detach().exp().numpy())


def around(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), layer, nn.Tanh()).eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


@DTYPES
def test_a_wrong_derivative_is_refused_at_its_module(dtype: torch.dtype) -> None:
    linear = LinearizedModel(around(Wrong(3, 3)).to(dtype))
    with pytest.raises(RuntimeError, match=r"J v of Sequential .* part in module '2' \(Wrong\)"):
        linear(torch.randn(8, 3, dtype=dtype))


@DTYPES
def test_a_stopped_gradient_is_said(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model, x = around(Stops(3, 3)).to(dtype), torch.randn(8, 3, dtype=dtype)
    with caplog.at_level(logging.WARNING):
        linear = LinearizedModel(model)
        linear(x)
        linear(x)
    assert len(caplog.records) == 1
    assert "Sequential stops gradients in module '2' (Stops)" in caplog.text
    with pytest.raises(RuntimeError, match=r"part in module '2' \(Stops\)"):
        LinearizedModel(model, check=True)(x)


def test_rows_that_get_no_gradient_by_convention_are_no_error() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2))
    LinearizedModel(model, check=True)(torch.tensor([[0, 1, 2], [3, 0, 0]]))


def test_kinks_at_theta0_are_no_error(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(model.get_parameter("0.bias"))
    LinearizedModel(model, check=True)(torch.zeros(4, 3))
    assert not caplog.records


class Noisy(nn.Linear):
    """Uses random numbers, and counts its calls in a buffer and in an attribute."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.calls = [0]
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        self.seen += 1
        return super().forward(x) + torch.rand(3) + self.seen


def test_it_costs_a_few_examples_once_for_each_kind_of_input() -> None:
    model, sizes = Noisy(), list[int]()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    theta0, v, x = weights(model), {"weight": torch.ones(3, 3)}, torch.randn(64, 3)
    state = torch.get_rng_state()
    out, _ = jvp(model, theta0, v, x)
    # one with tangents, two for the difference
    assert sizes == [EXAMPLES, EXAMPLES, EXAMPLES, 64]
    assert model.seen == model.calls[0] == 1
    torch.set_rng_state(state)
    with checking(False):
        torch.testing.assert_close(out - 1, jvp(model, theta0, v, x)[0] - 2)
    sizes.clear()
    jvp(model, theta0, v, torch.randn(9, 3))
    assert sizes == [9]  # another batch of the same kind
    jvp(model, theta0, v, torch.randn(9, 2, 3))
    assert len(sizes) > 2  # another kind


def test_inputs_that_cannot_be_cut_are_checked_whole() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Wrong(3, 3)

        def forward(self, x: Tensor, links: Tensor) -> Tensor:
            out: Tensor = links @ self.layer(x)
            return out

    model = Graph()
    with pytest.raises(RuntimeError, match="J v of Graph"):
        jvp(
            model,
            weights(model),
            {"layer.weight": torch.ones(3, 3)},
            torch.ones(8, 3),
            torch.eye(8),
        )


def test_half_precision_is_compared_in_float64() -> None:
    model = around(Wrong(3, 3)).bfloat16()
    with pytest.raises(RuntimeError, match=r"part in module '2' \(Wrong\)"):
        LinearizedModel(model)(torch.randn(8, 3, dtype=torch.bfloat16))
    LinearizedModel(around(nn.Linear(3, 3)).bfloat16())(torch.randn(8, 3, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_adapters_of_peft_are_linearised_alone() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    base = transformers.BertModel(config).eval()
    lora = peft.LoraConfig(target_modules=["query", "value"], r=2)
    linear = LinearizedModel(peft.get_peft_model(base, lora), check=True).double()
    names = [name for name, p in linear.named_parameters() if p.requires_grad]
    assert len(names) == 4 and all("lora_" in name for name in names)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    optimizer = torch.optim.SGD([p for p in linear.parameters() if p.requires_grad], 1.0)
    for _ in range(2):
        linear(input_ids=ids).last_hidden_state[..., 0].sum().backward()
        optimizer.step()
    theta0, delta = linear.theta0(), {n: linear.theta()[n] - linear.theta0()[n] for n in names}
    assert any(step.abs().max() > 0 for step in delta.values())

    def at(t: float) -> Tensor:
        moved = {n: theta0[n] + t * delta[n] for n in names}
        out = torch.func.functional_call(linear.module0(), moved, kwargs={"input_ids": ids})
        return out.last_hidden_state.detach()

    expected = at(0.0) + (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close(
        linear(input_ids=ids).last_hidden_state.detach(), expected, rtol=1e-7, atol=1e-7
    )


# --- python -m tangent_arithmetic.tangent.check


@pytest.fixture
def factories(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("factories_of_a_user")
    module.right = lambda: (around(nn.Linear(3, 3)), torch.randn(8, 3))
    module.wrong = lambda: (around(Wrong(3, 3)), (torch.randn(8, 3),))
    module.named = lambda: (nn.LSTM(3, 4), {"input": torch.randn(2, 1, 3)})
    module.not_one = lambda: 3
    monkeypatch.setitem(sys.modules, "factories_of_a_user", module)


@pytest.mark.parametrize(
    ("factory", "status", "lines"),
    [
        ("right", 0, ["exact: J v", r"linear  .*rule", r"tanh  .*rule"]),
        ("named", 0, ["exact: J v", r"recurrent_layer  .*rule", r"stack  .*forward AD"]),
        ("wrong", 1, [r"NOT EXACT: .* part in module '2' \(Wrong\)"]),
    ],
)
def test_the_command_gives_a_verdict_and_the_cost_of_each_operation(
    factories: None, capsys: pytest.CaptureFixture[str], factory: str, status: int, lines: list[str]
) -> None:
    assert check.main([f"factories_of_a_user:{factory}"]) == status
    out = capsys.readouterr().out
    for line in lines:
        assert re.search(line, out), out


@pytest.mark.parametrize("factory", ["factories_of_a_user:not_one", "no_such_module:f", "math"])
def test_the_command_says_what_a_factory_returns(
    factories: None, capsys: pytest.CaptureFixture[str], factory: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        check.main([factory])
    assert "expected a function that returns (model, inputs)" in capsys.readouterr().err
