"""Recurrent layers: tangents against differences, gradients against reverse mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.tangent import jvp
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.tangent.rules import recurrent

F64 = torch.float64
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (nn.LSTM, {}),
    (nn.GRU, {}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu"}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False},
]


class AllOutputs(nn.Module):
    """A recurrent layer between two others; returns the sequence and the last states."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(3, 3), layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out, last = self.layer(torch.tanh(self.embed(x)))
        return (out, *(last if isinstance(last, tuple) else (last,)))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "deep, both ways", "without biases"])
@pytest.mark.parametrize(("kind", "own"), KINDS, ids=["LSTM", "GRU", "tanh", "ReLU"])
def test_tangents_and_gradients(
    kind: Any, own: dict[str, Any], options: dict[str, Any], monkeypatch: Any
) -> None:
    torch.manual_seed(0)
    model, x = AllOutputs(kind(3, 4, **own, **options)).to(F64), torch.randn(5, 6, 3, dtype=F64)
    theta0 = {name: p.detach() for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p).requires_grad_() for name, p in theta0.items()}
    used, value = list[str](), recurrent._value

    def watched(kind: str, *args: Any) -> Tensor:
        used.append(kind)
        return value(kind, *args)

    monkeypatch.setattr(recurrent, "_value", watched)
    _, d_out = jvp(model, theta0, v, x)
    assert used  # by rule

    def at(t: float) -> tuple[Tensor, ...]:
        moved = {name: theta0[name] + t * v[name].detach() for name in theta0}
        outputs: tuple[Tensor, ...] = torch.func.functional_call(model, moved, x)
        return outputs

    for high, low, actual in zip(at(1e-6), at(-1e-6), d_out, strict=True):
        torch.testing.assert_close(actual.detach(), (high - low) / 2e-6, rtol=1e-6, atol=1e-8)
    u = [torch.randn_like(d) for d in d_out]
    inner = sum((d * w).sum() for d, w in zip(d_out, u, strict=True))
    grads = torch.autograd.grad(inner, list(v.values()))
    leaves = {name: p.clone().requires_grad_() for name, p in theta0.items()}
    outputs = torch.func.functional_call(model, leaves, x)
    total = sum((out * w).sum() for out, w in zip(outputs, u, strict=True))
    expected = torch.autograd.grad(total, list(leaves.values()))
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", ["packed", "projected", "dropout", "one example", "bfloat16"])
def test_other_calls_stay_exact(how: str) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, 2, proj_size=2 if how == "projected" else 0, dropout=0.3).train(
        how == "dropout"
    )
    x = torch.randn(5, 3) if how == "one example" else torch.randn(5, 2, 3)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if how == "packed":
                packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
                padded: Tensor = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]
                return padded
            out: Tensor = self.layer(x)[0]
            return out

    linear = LinearizedModel(Called(), check=how != "bfloat16")
    with torch.no_grad():
        for p in linear.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    if how == "bfloat16":
        exact = linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = linear(x)
        assert (rounded - exact).detach().norm() < 0.03 * exact.detach().norm()
    else:
        assert linear(x).isfinite().all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_that_require_grad_are_refused_by_name(kind: Any) -> None:
    linear, x = LinearizedModel(kind(3, 4)), torch.randn(5, 2, 3, requires_grad=True)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    with pytest.raises(NotImplementedError, match=rf"\({kind.__name__}\).*pass padded ones"):
        linear(packed)


def _called(model: nn.Module, x: Tensor) -> None:
    torch.func.functional_call(model, {n: p.detach() + 1 for n, p in model.named_parameters()}, x)


def _differentiated(model: nn.Module, x: Tensor) -> None:
    weights = {n: p.detach() for n, p in model.named_parameters()}
    torch.func.grad(lambda w: torch.func.functional_call(model, w, x)[0].sum())(weights)


def _replaced(model: nn.Module, x: Tensor) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("use", [_called, _differentiated, _replaced])
@pytest.mark.parametrize("whose", ["the module's", "the linear model's"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_users_own_calls_in_between(kind: Any, whose: str, use: Any) -> None:
    """Recurrent layers keep a list of their weights, which PyTorch's own calls replace."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, dtype=F64)
    model = AllOutputs(kind(3, 4, 2, bidirectional=True)).to(F64)
    linear = LinearizedModel(model)
    with torch.no_grad():
        for p in linear.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    before, plain = linear(x)[0].detach().clone(), model(x)[0].detach().clone()
    for _ in range(2):
        use(linear if whose == "the linear model's" else model, x)
        assert torch.equal(linear(x)[0], before) and torch.equal(model(x)[0], plain)
