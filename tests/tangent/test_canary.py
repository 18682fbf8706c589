"""The check of first calls sees what is wrong, names its place, and leaves all else alone."""

from __future__ import annotations

import logging
import random
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tangent_arithmetic.tangent import at_once, check, checking, jvp, jvps
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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


def before_layer_norm() -> nn.Module:
    first = nn.Linear(4, 1)
    nn.init.ones_(first.weight)  # or its output may be near zero
    return nn.Sequential(first, nn.Linear(1, 8, bias=False), nn.LayerNorm(8, eps=0.0))


WITHOUT_EFFECT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "key bias": (Attention, (4, 5, 8), "k.bias"),
    "bias, group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.GroupNorm(1, 1)),
        (4, 3, 8, 8),
        "0.bias",
    ),
    "bias, instance norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)),
        (4, 3, 8, 8),
        "0.bias",
    ),
    "scale, layer norm": (before_layer_norm, (8, 4), "0.weight"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_direction_without_effect_has_derivative_zero(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    make, shape, moving = WITHOUT_EFFECT[name]
    torch.manual_seed(0)
    model, x = make().to(dtype), torch.rand(shape, dtype=dtype)
    v = {moving: torch.randn_like(model.get_parameter(moving))}
    bound = 100 * torch.finfo(dtype).eps  # v is large beside the weights
    assert jvp(model, weights(model), v, x)[1].abs().max() < bound
    if name == "key bias":
        assert all(d.abs().max() < bound for d in jvps(model, weights(model), [v, v], x)[1])
        other = make().to(dtype).requires_grad_(False)
        other.load_state_dict(model.state_dict())
        other.get_parameter(moving).data.add_(1)
        other.get_parameter(moving).requires_grad_(True)
        torch.testing.assert_close(LinearizedModel(other, model)(x), model(x))
    assert not caplog.records


@DTYPES
def test_a_wrong_derivative_far_below_the_output_is_refused(dtype: torch.dtype) -> None:
    class Small(Wrong):
        def forward(self, x: Tensor) -> Tensor:
            return 1 + 1e-4 * super().forward(x)

    with pytest.raises(RuntimeError, match=r"\(Small\)"):
        LinearizedModel(Small(3, 3).to(dtype))(torch.randn(8, 3, dtype=dtype))


class Masked(nn.Module):
    """A layer with a buffer whose rows share their memory."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("mask", torch.ones(3).expand(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * self.get_buffer("mask")[: len(x)]
        return out


def test_buffers_made_by_expand_are_no_obstacle() -> None:
    with pytest.raises(RuntimeError, match=r"part in module 'layer' \(Wrong\)"):
        LinearizedModel(Masked(Wrong(3, 3)))(torch.randn(5, 3))
    model, x = Masked(nn.Linear(3, 3)), torch.randn(5, 3)
    torch.testing.assert_close(LinearizedModel(model, check=True)(x), model(x))
    v = {"layer.weight": torch.ones(3, 3)}
    with at_once(1):
        steps = jvps(model, weights(model), [v, v], x)[1]
    for step in steps:
        torch.testing.assert_close(step, x.sum(1, keepdim=True).expand(5, 3))


class Fancy(nn.Module):
    """Two layers with a wrong derivative between them, if it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.wrong = nn.Linear(3, 3), nn.Linear(3, 3), Wrong(3, 3)
        self.wrong.requires_grad_(False)

    def forward(self, x: Tensor, fancy: object = True, step: int = 0) -> Tensor:
        h = self.body(x)
        out: Tensor = self.head(self.wrong(h) if fancy not in (False, "plain") else h)
        return out


@pytest.mark.parametrize(("plain", "fancy"), [(False, True), ("plain", "fancy")])
def test_another_flag_is_checked_anew(plain: object, fancy: object) -> None:
    linear, x = LinearizedModel(Fancy()), torch.randn(5, 3)
    linear(x, plain)
    with pytest.raises(RuntimeError, match=r"module 'wrong' \(Wrong\)"):
        linear(x, fancy)


def test_parameters_that_move_later_are_checked_then() -> None:
    linear, x = LinearizedModel(Fancy()), torch.randn(5, 3)
    linear.body.requires_grad_(False)
    linear(x)
    linear.body.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"module 'wrong' \(Wrong\)"):
        linear(x)


def test_a_number_among_the_inputs_is_no_new_kind() -> None:
    model, calls = Fancy(), list[int]()
    linear = LinearizedModel(model)
    linear.module0().register_forward_pre_hook(lambda *_: calls.append(1))
    linear(torch.randn(5, 3), False, 1)
    calls.clear()
    linear(torch.randn(5, 3), False, 2)
    assert len(calls) == 1


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            size = h.norm()
        out: Tensor = self.last(h / size)
        return out


@DTYPES
def test_a_region_without_gradients_is_said(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = Scaled().to(dtype), torch.randn(5, 3, dtype=dtype)
    LinearizedModel(model)(x)
    assert len(caplog.records) == 1 and "under no_grad" in caplog.text
    with pytest.raises(RuntimeError, match="under no_grad"):
        LinearizedModel(model, check=True)(x)


def test_the_first_call_may_be_in_a_checkpoint() -> None:
    torch.manual_seed(0)
    model, x = around(nn.Linear(3, 3)), torch.randn(5, 3)
    first, other = LinearizedModel(model), LinearizedModel(model)
    checkpoint(first, x, use_reentrant=False).sum().backward()
    other(x).sum().backward()
    for one, two in zip(first.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


SOURCES: dict[str, Callable[[Any], Tensor]] = {
    "PyTorch": lambda s: torch.randn(5, 3),
    "Python": lambda s: torch.tensor(random.random()),
    "NumPy": lambda s: torch.tensor(np.random.normal()),  # noqa: NPY002
    "own, PyTorch": lambda s: torch.randn(5, 3, generator=s.torch),
    "own, Python": lambda s: torch.tensor(s.python.random()),
    "own, NumPy": lambda s: torch.tensor(s.numpy.normal()),
    "own, old NumPy": lambda s: torch.tensor(s.numpys.normal()),
}


class Drawing(nn.Linear):
    """Adds random numbers, before a nonlinearity."""

    def __init__(self, draw: Callable[[Any], Tensor]) -> None:
        super().__init__(3, 3)
        self.draw, self.torch = draw, torch.Generator().manual_seed(0)
        self.numpy, self.numpys = np.random.default_rng(0), np.random.RandomState(0)
        self.python = random.Random(0)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = self.draw(self)
        if generator is not None:
            noise = noise + torch.randn(5, 3, generator=generator)
        return torch.tanh(super().forward(x) + noise[: len(x)] if noise.ndim else noise)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_random_numbers_are_those_without_a_check(
    source: str, given: bool, caplog: pytest.LogCaptureFixture
) -> None:
    outputs, x = [], torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for enabled in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = Drawing(SOURCES[source]).double()
        inputs = (x.double(), torch.Generator().manual_seed(0)) if given else (x.double(),)
        with checking(enabled):
            outputs.append(LinearizedModel(model)(*inputs))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert not caplog.records


def test_an_iterator_is_not_exhausted_by_a_check() -> None:
    class Sum(nn.Linear):
        def forward(self, parts: Any) -> Tensor:
            return torch.stack([super(Sum, self).forward(x) for x in parts]).sum(0)

    model, x = Sum(3, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(LinearizedModel(model)(iter(x)), model(x))


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
    # three for the buffer, one with tangents, two for the difference
    assert sizes == [*[EXAMPLES] * 6, 64]
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


def test_what_is_refused_once_is_refused_again() -> None:
    linear, x = LinearizedModel(around(Wrong(3, 3))), torch.randn(5, 3)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected J v"):
            linear(x)


class Body(nn.Module):
    """Computes its middle in bfloat16, by its weights or under autocast, and normalises it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).to(dtype)
        self.norm = nn.LayerNorm(16)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.body(self.stem(x).to(self.dtype)).float()))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_inside_is_no_disagreement(dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        linear, x = LinearizedModel(Body(dtype)), torch.randn(4, 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            linear(x)


def test_weights_that_parametrize_keeps_are_of_no_other_pass() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh())
    theta0, x = weights(model), torch.randn(5, 4)
    v = {name: torch.randn_like(value) for name, value in theta0.items()}
    expected = jvp(model, theta0, v, x)[1]
    linear = LinearizedModel(model)
    with nn.utils.parametrize.cached():
        torch.testing.assert_close(jvp(model, theta0, v, x)[1], expected)
        linear(x).sum().backward()
    assert all(p.grad is not None for p in linear.parameters())


def test_slices_of_a_list_of_parameters_move() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterList([torch.ones(4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for scale in self.scales[1:]:
                x = torch.tanh(x * scale)
            return x

    linear, x = LinearizedModel(Sliced()), torch.randn(5, 4)
    linear(x).sum().backward()
    model = Sliced()
    model(x).sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(linear.get_parameter(name).grad, value.grad)
