"""The engine agrees with PyTorch's own forward AD, and says so where it cannot."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tangent_arithmetic.tangent import (
    Displacement,
    checking,
    duals,
    jvp,
    jvps,
    outputs,
    plain_jvp,
    rule,
)
from tangent_arithmetic.tangent.linearized import LinearizedModel
from tangent_arithmetic.tangent.rules import RULES

F64 = torch.float64


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


class Block(nn.Module):
    """A little of everything that a vision transformer has."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


def frozen(model: nn.Module, dtype: torch.dtype = F64) -> nn.Module:
    return model.to(dtype).eval().requires_grad_(False)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def direction(model: nn.Module, seed: int = 1, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for name, value in model.named_parameters()
    }


@pytest.fixture
def block() -> nn.Module:
    return frozen(Block())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 8, dtype=F64)


def finite_difference(model: nn.Module, v: dict[str, Tensor], *args: Any) -> Tensor:
    def at(step: float) -> Tensor:
        moved = {name: value + step * v[name] for name, value in weights(model).items()}
        out: Tensor = torch.func.functional_call(model, moved, args)
        return out

    return (at(1e-5) - at(-1e-5)) / 2e-5


# --- values and gradients


def test_the_tangent_is_the_directional_derivative(block: nn.Module, x: Tensor) -> None:
    v = direction(block)
    out, d_out = jvp(block, weights(block), v, x)
    assert relative(out, block(x)) < 1e-14
    assert relative(d_out, finite_difference(block, v, x)) < 1e-8


def test_the_backward_pass_is_the_transpose(block: nn.Module, x: Tensor) -> None:
    v = {name: value.requires_grad_() for name, value in direction(block).items()}
    d_out = jvp(block, weights(block), v, x)[1]
    g = torch.randn_like(d_out)
    found = torch.autograd.grad((g * d_out).sum(), list(v.values()))
    reference = plain_jvp(block, weights(block), v, x)[1]
    expected = torch.autograd.grad((g * reference).sum(), list(v.values()))
    for one, other in zip(found, expected, strict=True):
        # a bias of keys moves no probability: its gradient is zero but for rounding
        assert (one - other).norm() <= 1e-12 * (1 + other.norm())


def test_the_value_carries_no_gradient_to_the_tangents(block: nn.Module, x: Tensor) -> None:
    v = {name: value.requires_grad_() for name, value in direction(block).items()}
    out, d_out = jvp(block, weights(block), v, x)
    assert not out.requires_grad and d_out.requires_grad


def test_directions_that_are_missing_are_zero(block: nn.Module, x: Tensor) -> None:
    v = direction(block)
    some = {name: v[name] for name in ("norm.weight", "mlp.2.bias")}
    filled = {name: some.get(name, torch.zeros_like(value)) for name, value in v.items()}
    found, expected = (jvp(block, weights(block), d, x)[1] for d in (some, filled))
    assert relative(found, expected) < 1e-14
    assert torch.count_nonzero(jvp(block, weights(block), {}, x)[1]) == 0


def test_several_directions_share_one_pass(block: nn.Module, x: Tensor) -> None:
    vectors = [direction(block, seed) for seed in range(3)]
    calls = []
    hook = block.get_submodule("mlp.0").register_forward_hook(lambda *_: calls.append(1))
    with checking(False):
        out, found = jvps(block, weights(block), vectors, x)
    hook.remove()
    assert len(calls) == 1
    assert relative(out, block(x)) < 1e-14
    for v, one in zip(vectors, found, strict=True):
        assert relative(one, plain_jvp(block, weights(block), v, x)[1]) < 1e-13


def test_directions_that_differ_in_their_names_share_a_pass(block: nn.Module, x: Tensor) -> None:
    v = direction(block)
    vectors = [{"mlp.0.weight": v["mlp.0.weight"]}, {"norm.bias": v["norm.bias"]}, v]
    for one, d in zip(vectors, jvps(block, weights(block), vectors, x)[1], strict=True):
        assert relative(d, plain_jvp(block, weights(block), one, x)[1]) < 1e-13


class InPlace(nn.Module):
    """In-place operations on what carries a tangent, on its views, and on what carries none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        z = y[:, :2]
        z.mul_(3.0)  # y too
        y += 0.5 * x
        y = self.relu(y) + 0.1 * y  # y is its own positive part by now
        table = torch.zeros(len(x), 6, dtype=x.dtype)
        table[:, 1:5] = y
        y[:, 3].mul_(2.0)
        return torch.cat([table, y.masked_fill(x > 1, 3.0)], dim=1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_in_place_operations_keep_their_meaning(grad: bool, count: int) -> None:
    model, x = frozen(InPlace()), torch.randn(6, 4, dtype=F64)
    vectors = [direction(model, seed) for seed in range(count)]
    with torch.set_grad_enabled(grad):
        if grad:
            vectors = [{n: t.requires_grad_() for n, t in v.items()} for v in vectors]
        out, found = jvps(model, weights(model), vectors, x)
    assert relative(out, model(x)) < 1e-14
    for v, one in zip(vectors, found, strict=True):
        plain = {name: value.detach() for name, value in v.items()}
        assert relative(one.detach(), finite_difference(model, plain, x)) < 1e-8
        if grad:
            g = torch.randn_like(one)
            grads = torch.autograd.grad((g * one).sum(), list(v.values()))
            reference = plain_jvp(model, weights(model), v, x)[1]
            expected = torch.autograd.grad((g * reference).sum(), list(v.values()))
            for a, b in zip(grads, expected, strict=True):
                assert relative(a, b) < 1e-12


def test_an_activation_in_place_shares_the_pass() -> None:
    model = frozen(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))
    x, vectors = torch.randn(3, 4, dtype=F64), [direction(model, 0), direction(model, 1)]
    calls = []
    model.get_submodule("0").register_forward_hook(lambda *_: calls.append(1))
    with checking(False):
        found = jvps(model, weights(model), vectors, x)[1]
    assert len(calls) == 1
    for v, one in zip(vectors, found, strict=True):
        assert relative(one, plain_jvp(model, weights(model), v, x)[1]) < 1e-14


def test_arguments_are_not_changed(x: Tensor) -> None:
    model = frozen(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)))
    theta0, v = weights(model), direction(model)
    copies = [{n: t.clone() for n, t in state.items()} for state in (theta0, v)]
    one = x[:1, 0]  # a single row: a bias then has the shape of the output
    before = one.clone()
    jvp(model, theta0, v, one)
    for state, copy in zip((theta0, v), copies, strict=True):
        for name in state:
            assert torch.equal(state[name], copy[name])
    assert torch.equal(one, before)


# --- differences


def test_a_displacement_is_formed_when_it_is_read() -> None:
    theta, theta0 = torch.tensor([1.5]), torch.tensor([1.0], dtype=torch.bfloat16)
    step = Displacement({"w": theta}, {"w": theta0, "unused": theta0})
    assert list(step) == ["w"] and len(step) == 1
    assert step["w"] is not step["w"]
    assert step["w"].dtype == torch.bfloat16 and step["w"].item() == 0.5


def test_at_most_a_few_differences_live_at_once(
    block: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    deep = frozen(nn.Sequential(*(Block() for _ in range(8))))
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    form = Displacement.__getitem__

    def counted(self: Displacement, name: str) -> Tensor:
        nonlocal most
        value = form(self, name)
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr(Displacement, "__getitem__", counted)
    theta = {name: (value + 0.1).requires_grad_() for name, value in weights(deep).items()}
    jvp(deep, weights(deep), Displacement(theta, weights(deep)), x)[1].sum().backward()
    assert len(alive) >= len(theta) == 80
    assert most < 30


def test_low_precision_differences_are_formed_in_float32() -> None:
    model = frozen(nn.Linear(1, 1, bias=False), torch.bfloat16)
    theta0 = {"weight": torch.ones(1, 1, dtype=torch.bfloat16)}
    theta = {"weight": torch.full((1, 1), 1.0 + 2**-10)}  # below the step of bfloat16 at 1
    d_out = jvp(model, theta0, Displacement(theta, theta0), torch.ones(1, 1).bfloat16())[1]
    assert d_out.item() == 2**-10


# --- the traps


def test_inference_mode_does_not_lose_tangents(block: nn.Module, x: Tensor) -> None:
    v = direction(block)
    expected = jvp(block, weights(block), v, x)[1]
    with torch.inference_mode():
        found = jvp(block, weights(block), v, x.clone())[1]
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found, expected)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


def test_an_output_that_lost_its_tangent_is_an_error() -> None:
    model, x = frozen(Detached()), torch.ones(1, 2, dtype=F64)
    with pytest.raises(RuntimeError, match="expected an output of Detached that depends"):
        jvp(model, weights(model), direction(model), x)
    zero = {name: torch.zeros_like(value) for name, value in weights(model).items()}
    assert torch.count_nonzero(jvp(model, weights(model), zero, x)[1]) == 0


class Shifted(nn.Module):
    """A parameter times a buffer, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(8, 2)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((self.block(x) + self.shift).square())
        return out


@pytest.mark.parametrize("which", ["x", "head.weight", "block.mlp.0.weight", "shift"])
def test_what_requires_grad_gets_exact_gradients(which: str, x: Tensor) -> None:
    model = frozen(Shifted())
    v = direction(model)
    values = {**weights(model), "shift": model.get_buffer("shift"), "x": x}

    def d(moved: Tensor) -> Tensor:
        state = {**values, which: moved}
        found: Tensor = jvp(model, {n: t for n, t in state.items() if n != "x"}, v, state["x"])[1]
        return found.square().sum()

    leaf, step = values[which].clone().requires_grad_(), torch.randn_like(values[which])
    (found,) = torch.autograd.grad(d(leaf), [leaf])
    expected = (d(values[which] + 1e-5 * step) - d(values[which] - 1e-5 * step)) / 2e-5
    assert (found * step).sum().item() == pytest.approx(expected.item(), rel=1e-7)


def test_second_derivatives_are_refused_with_the_way_out(block: nn.Module, x: Tensor) -> None:
    model = LinearizedModel(block).requires_grad_()
    out = model(x).square().sum()
    with pytest.raises(RuntimeError, match=r"nest torch\.func\.jacrev"):
        torch.autograd.grad(out, list(model.parameters()), create_graph=True)


def test_the_way_out_for_second_derivatives_works() -> None:
    net = frozen(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.GELU(), nn.Linear(2, 2)))
    model, x = LinearizedModel(net), torch.randn(4, 3, dtype=F64)
    theta = {name: value.detach() for name, value in model.named_parameters()}

    def loss(p: Tensor) -> Tensor:
        state = {**theta, "0.weight": p}
        return torch.func.functional_call(model, state, (x,)).square().sum()

    hessian = torch.func.jacrev(torch.func.jacrev(loss))(theta["0.weight"]).reshape(6, 6)
    jacobian = torch.func.jacrev(
        lambda p: torch.func.functional_call(net, {**weights(net), "0.weight": p}, (x,))
    )(theta["0.weight"]).reshape(-1, 6)
    assert relative(hessian, 2 * jacobian.T @ jacobian) < 1e-12  # Gauss-Newton: f_lin is affine


def test_under_grad_and_vmap_of_torch_func(block: nn.Module, x: Tensor) -> None:
    model = LinearizedModel(block).requires_grad_()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    theta = {name: value.detach() for name, value in model.named_parameters()}

    def f(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (one[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(f), (None, 0))(theta, x)
    for i, one in enumerate(x):
        model.zero_grad()
        model(one[None]).square().sum().backward()
        for name, value in model.named_parameters():
            assert value.grad is not None
            assert (each[name][i] - value.grad).norm() <= 1e-12 * (1 + value.grad.norm())


def test_nested_forward_ad_is_refused(block: nn.Module, x: Tensor) -> None:
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"got torch\.func\.jvp, jacfwd"),
    ):
        jvp(block, weights(block), direction(block), x)


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_forward_ad_of_torch_func_around_it_is_refused(transform: Any) -> None:
    model = LinearizedModel(frozen(nn.Linear(2, 1))).requires_grad_()
    with pytest.raises(RuntimeError, match="is wrong for some operations, such as layer_norm"):
        transform(lambda x: model(x).sum())(torch.ones(2, dtype=F64))


@pytest.mark.parametrize("enabled", [True, False])
def test_flags_are_restored_after_an_exception(enabled: bool) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            raise KeyError("broken")

    model = frozen(Broken())
    own = model.layer._parameters  # type: ignore[union-attr]
    attention = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(KeyError, match="broken"):
            jvp(model, weights(model), direction(model), torch.ones(1, 2, dtype=F64))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.backends.cuda.flash_sdp_enabled() is attention
    assert forward_ad._current_level == -1
    assert model.layer._parameters is own  # type: ignore[union-attr]
    assert type(own) is dict and torch.is_grad_enabled()


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), NoForwardModule())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


class NoForwardModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = NoForward.apply(x)
        return out


@pytest.mark.parametrize("learnt", [False, True])
def test_an_operation_without_forward_ad_is_named_with_its_module(learnt: bool) -> None:
    model, x = frozen(Hidden()), torch.ones(30, 3, dtype=F64)
    v = {name: value.requires_grad_(learnt) for name, value in direction(model).items()}
    with pytest.raises(
        NotImplementedError, match=r"NoForward in module 'inner\.1' \(NoForwardModule\)"
    ):
        jvp(model, weights(model), v, x)


class Counts(nn.Linear):
    """Uses an operation of PyTorch whose derivative cannot be differentiated again."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x).log_softmax(-1)[:, None].expand(-1, 2, -1).transpose(0, 1)
        lengths = torch.tensor([2] * len(x))
        ones = torch.ones(len(x), 1).long()
        return F.ctc_loss(logits, ones, lengths, lengths - 1, reduction="none")


def test_an_operation_of_pytorch_without_forward_ad_is_named() -> None:
    model, x = frozen(Counts(3, 3)), torch.ones(70, 3, dtype=F64)
    with pytest.raises(NotImplementedError, match=r"ctc_loss in the module itself \(Counts\)"):
        jvp(model, weights(model), direction(model), x)
    assert jvp(model, weights(model), direction(model), x[:2])[1].abs().min() > 0


class Doubling(torch.autograd.Function):
    """A custom function with forward AD of its own, deliberately not that of its value."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 3 * grad * w, 3 * (grad * x).sum(0)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor) -> Tensor:
        x, w = ctx.saved_tensors
        return 3 * (dx * w + x * dw)


class Tripled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Doubling.apply(self.layer(x), self.scale)
        return out


@pytest.mark.parametrize("count", [1, 2])
def test_a_custom_function_with_forward_ad_of_its_own_is_obeyed(count: int) -> None:
    model, x = frozen(Tripled()), torch.randn(2, 3, dtype=F64)
    vectors = [direction(model, seed) for seed in range(count)]
    for v, found in zip(vectors, jvps(model, weights(model), vectors, x)[1], strict=True):
        assert relative(found, 3 * finite_difference(model, v, x)) < 1e-8


def test_names_that_are_no_parameters_are_refused(block: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a direction over parameters, got also nonsense"):
        jvp(block, weights(block), {"nonsense": torch.ones(1)}, x)
    with pytest.raises(ValueError, match="params0 has names unknown to the module: other"):
        jvp(block, {"other": torch.ones(1)}, direction(block), x)
    with pytest.raises(ValueError, match="at least one direction"):
        jvps(block, weights(block), [], x)


# --- outputs


class Tied(nn.Module):
    """Tied parameters, and tied buffers."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, dtype=F64), nn.Linear(8, 8, dtype=F64)
        self.b.weight = self.a.weight
        scales = torch.full((8,), scale, dtype=F64)
        self.a.register_buffer("scale", scales)
        self.b.register_buffer("scale", scales)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)) * self.a.get_buffer("scale"))
        return out * self.b.get_buffer("scale")


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("without", [(), ("b.weight", "b.scale"), ("a.weight", "a.scale")])
def test_tied_weights_may_have_any_of_their_names(
    without: tuple[str, ...], learnt: bool, x: Tensor
) -> None:
    model, other = frozen(Tied(1.0)), frozen(Tied(3.0))
    v = direction(other)
    values = {name: t for name, t in other.state_dict().items() if name not in without}
    _, d_out = jvp(model, values, v, x.clone().requires_grad_(learnt))
    assert relative(d_out.detach(), finite_difference(other, v, x)) < 1e-8


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, kind: str) -> Any:
        y = self.layer(x)
        if kind == "opaque":
            return Opaque(y)
        return {"y": y, "rest": (y.argmax(-1), "text", None, x, [y.square()])}


class Opaque:
    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_trees_of_outputs() -> None:
    model, x = frozen(Outputs()), torch.randn(2, 3, dtype=F64)
    lin = LinearizedModel(model).requires_grad_()
    with torch.no_grad():
        lin.layer.weight.add_(0.1)  # type: ignore[operator, union-attr]
    out, d_out = lin.primal_and_tangent(x, kind="tree")
    y, dy = model.layer(x), 0.1 * x.sum(-1, keepdim=True).expand(2, 3)  # type: ignore[operator]
    assert torch.allclose(out["y"], y) and torch.allclose(d_out["y"], dy)
    assert torch.allclose(d_out["rest"][4][0], 2 * y * dy)
    assert torch.count_nonzero(d_out["rest"][3]) == 0
    total = lin(x, kind="tree")
    assert torch.equal(total["rest"][0], y.argmax(-1)) and total["rest"][1:3] == ("text", None)
    assert torch.allclose(total["y"], y + dy)


def test_an_output_that_hides_tensors_is_refused() -> None:
    model, x = frozen(Outputs()), torch.randn(2, 3, dtype=F64)
    with pytest.raises(TypeError, match="got Opaque with tensors in it"):
        jvp(model, weights(model), direction(model), x, kind="opaque")


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return frozen(GPT2Model(config))


def test_the_cache_of_a_language_model_does_not_leak(caplog: pytest.LogCaptureFixture) -> None:
    outputs.log_once.cache_clear()
    model, ids = _gpt2(), torch.tensor([[1, 2, 3]])
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic.tangent.outputs"):
        out, d_out = jvp(model, weights(model), direction(model), ids)
    assert "has no tangents: replaced by None" in caplog.text
    assert out.past_key_values is None and d_out.past_key_values is None
    assert type(out) is type(model(ids))
    filled = model(ids, use_cache=True).past_key_values
    with pytest.raises(TypeError, match="expected no cached keys and values, got a filled"):
        jvp(model, weights(model), direction(model), ids, past_key_values=filled)


# --- rules


def test_a_rule_of_ones_own(block: nn.Module) -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sinc(self.w * x)

    model, x = frozen(Wave()), torch.randn(3, 4, dtype=F64)
    v = direction(model)
    expected = jvp(model, weights(model), v, x)[1]
    used = []

    def sinc(input: Tensor) -> Any:
        def push(d: Any) -> Tensor:
            used.append(1)
            at = math.pi * input
            return d(input) * math.pi * (at.cos() / at - at.sin() / at**2)

        return torch.sinc(input), push

    rule(torch.sinc)(sinc)
    try:
        found = jvp(model, weights(model), v, x)[1]
    finally:
        del RULES[torch.sinc]
    assert used and relative(found, expected) < 1e-12


def test_without_any_rule_the_answer_is_the_same(
    block: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = {name: value.requires_grad_() for name, value in direction(block).items()}
    with_rules = jvp(block, weights(block), v, x)[1]
    monkeypatch.setattr(duals, "RULES", {})
    monkeypatch.setattr(duals, "COMPOSITES", {F.multi_head_attention_forward: _left_alone})
    without = jvp(block, weights(block), v, x)[1]
    assert relative(without.detach(), with_rules.detach()) < 1e-13
    g = torch.randn_like(without)
    pairs = zip(
        torch.autograd.grad((g * without).sum(), list(v.values())),
        torch.autograd.grad((g * with_rules).sum(), list(v.values())),
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).norm() <= 1e-12 * (1 + other.norm())


def _left_alone(*args: Any, **kwargs: Any) -> Any:
    return NotImplemented


# --- precision


def test_bf16_autocast_stays_near_float32(block: nn.Module) -> None:
    model = LinearizedModel(frozen(block, torch.float32)).requires_grad_()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1e-3 * torch.randn_like(value))
    expected = model(x)
    tangent = model.primal_and_tangent(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        low, d_low = model.primal_and_tangent(x)
    assert found.dtype == torch.float32
    assert relative(found.detach(), expected.detach()) < 2e-2
    assert relative(d_low.float().detach(), tangent.detach()) < 3e-2
    assert torch.equal(found, low.float() + d_low.float())  # summed in float32
    g = torch.randn_like(found)
    (g * found).sum().backward()
    low_grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(grad.dtype == torch.float32 for grad in low_grads)
    model.zero_grad()
    (g * expected).sum().backward()
    high_grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in low_grads])
    assert relative(flat, torch.cat([grad.flatten() for grad in high_grads])) < 5e-2


# --- torch.compile


def test_compiling_falls_back_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    from tangent_arithmetic.tangent import linearized as linearize

    net = frozen(nn.Sequential(nn.Linear(3, 2), nn.GELU()), torch.float32)
    model = LinearizedModel(net).requires_grad_()
    x = torch.randn(2, 3)
    linearize._warn_once.cache_clear()
    compiled = torch.compile(model, backend="eager")
    with caplog.at_level(logging.WARNING, logger="tangent_arithmetic.tangent.linearized"):
        found = compiled(x)
    assert torch.equal(found, model(x))
    assert "runs uncompiled" in caplog.text
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("where", ["around", "inside", "in place"])
def test_compiled_modules_are_expanded(where: str) -> None:
    net: Any = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.GELU()), nn.Linear(4, 2))
    x, names = torch.randn(2, 3), [name for name, _ in net.named_parameters()]
    expected, model = net(x), net
    if where == "around":
        model = torch.compile(net, backend="eager")
    elif where == "inside":
        model[0], names = torch.compile(net[0], backend="eager"), []
    else:
        model.compile(backend="eager")
    linear = LinearizedModel(model, model)
    assert not names or [name for name, _ in linear.named_parameters()] == names
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()  # a copy does not see it
    torch.testing.assert_close(linear(x), expected)


# --- modules that bring their own ways


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules_take_pytorchs_way() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.GELU()))
    model = frozen(nn.Sequential(scripted, nn.Linear(4, 2)))
    v, x = direction(model), torch.randn(2, 3, dtype=F64)
    found = jvp(model, weights(model), v, x)[1]
    assert relative(found, finite_difference(model, v, x)) < 1e-8
