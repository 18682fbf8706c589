"""The linearisation agrees with dense Jacobians in float64 and leaves the caller's module alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import Displacement, checking, jvp, plain_jvp
from tangent_arithmetic.tangent.backends import forward_ad_backends
from tangent_arithmetic.tangent.duals import Duals
from tangent_arithmetic.tangent.linearized import LinearizedModel, linearize

F64 = torch.float64
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def _moved(model: nn.Module, amount: float = 0.1, seed: int = 1) -> nn.Module:
    """A copy of a module at other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(amount * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return other


def _with_statistics(model: nn.Module) -> nn.Module:
    """Gives batch normalisation running statistics that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


# --- the cases: a module and its inputs, both in float64


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 3))


def _conv() -> nn.Module:
    return _with_statistics(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.BatchNorm2d(5),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(5, 3),
        )
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _vision_transformer() -> nn.Module:
    from open_clip.model import CLIP

    clip = CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    )
    visual: nn.Module = clip.visual
    return visual


def _resnet() -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    model = ModifiedResNet([1, 1, 1, 1], output_dim=4, heads=2, image_size=32, width=8)
    return _with_statistics(model)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=17,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=6,
        )
    )


def _words() -> Inputs:
    # no id is 0: the row of the padding has no reverse-mode derivative, though it has a derivative
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    return (), {"input_ids": ids, "attention_mask": (ids < 8).long()}


def _random(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(*shape, dtype=F64),), {})


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "mlp": (_mlp, _random(4, 5)),
    "conv": (_conv, _random(2, 3, 6, 6)),
    "encoder": (_encoder, _random(2, 3, 8)),
    "vision transformer": (_vision_transformer, _random(2, 3, 8, 8)),
    "resnet": (_resnet, _random(2, 3, 32, 32)),
    "bert": (_bert, _words),
}


@dataclass
class Problem:
    """A module at theta, the same at theta0, inputs, and the dense Jacobian at theta0."""

    model: nn.Module
    init_model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    f0: list[Tensor] = field(init=False)  # one tensor an output
    jacobian: list[dict[str, Tensor]] = field(init=False)  # name -> (*output, *parameter)

    def __post_init__(self) -> None:
        module = copy.deepcopy(self.init_model).eval()
        self.theta0 = {name: value.detach() for name, value in module.named_parameters()}

        def f(params: dict[str, Tensor]) -> list[Tensor]:
            return pytree.tree_leaves(functional_call(module, params, self.args, self.kwargs))

        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            self.f0 = [value.detach() for value in f(self.theta0)]
            self.jacobian = jacrev(f)(self.theta0)

    def expansion(self, theta: dict[str, Tensor]) -> list[Tensor]:
        """f0 + J (theta - theta0), one tensor an output."""
        outputs = []
        for out, rows in zip(self.f0, self.jacobian, strict=True):
            for name, value in theta.items():
                step = value - self.theta0[name]
                out = out + torch.tensordot(rows[name], step, dims=step.ndim)
            outputs.append(out)
        return outputs

    def linearized(self) -> LinearizedModel:
        """Our own."""
        return LinearizedModel(self.model, self.init_model)


@pytest.fixture(scope="module", params=CASES)
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    make, inputs = CASES[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        init_model = make().to(F64)
        args, kwargs = inputs()
        yield Problem(_moved(init_model), init_model, args, kwargs)


# --- linearize


def test_quadratic_expands_to_its_closed_form() -> None:
    """f(w) = w'Aw / 2 + b'w has the gradient Aw + b (A symmetric)."""
    a, b, w0, w = torch.randn(4, 4, dtype=F64), *torch.randn(3, 4, dtype=F64)
    a = a + a.T

    def f(params: dict[str, Tensor], scale: float, shift: float = 0.0) -> Tensor:
        v = params["w"]
        return scale * (v @ a @ v / 2 + b @ v) + shift

    value = linearize(f, {"w": w0})({"w": w}, 3.0, shift=5.0)
    expected = 3.0 * (w0 @ a @ w0 / 2 + b @ w0 + (a @ w0 + b) @ (w - w0)) + 5.0
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert abs(value - f({"w": w}, 3.0, shift=5.0)) > 0.1  # f itself is not affine


def test_outputs_may_be_trees_with_whole_numbers() -> None:
    def f(params: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        y = params["w"] ** 2 * x
        return {"all": [y, y.argmax()]}

    f_lin = linearize(f, {"w": torch.full((3,), 2.0, dtype=F64)})
    out = f_lin({"w": torch.full((3,), 3.0, dtype=F64)}, torch.tensor([1.0, 4.0, 2.0], dtype=F64))
    assert out["all"][0].tolist() == [8.0, 32.0, 16.0]  # (4 + 2 * 2 * (3 - 2)) x
    assert out["all"][1].item() == 1


def test_gradient_in_params_is_the_jacobian_at_params0() -> None:
    w0, w = torch.randn(2, 5, dtype=F64)
    w.requires_grad_()
    linearize(lambda p: (p["w"] ** 3).sum(), {"w": w0})({"w": w}).backward()
    torch.testing.assert_close(w.grad, 3 * w0**2, rtol=1e-12, atol=0)


def test_params_of_another_shape_are_listed() -> None:
    f_lin = linearize(lambda p: p["w"], {"w": torch.zeros(2), "old": torch.zeros(1)})
    message = (
        r"(?s)params and params0 do not match.*only in the first: new"
        r".*only in the second: old.*w: shape \(3,\) against \(2,\)"
    )
    with pytest.raises(ValueError, match=message):
        f_lin({"w": torch.zeros(3), "new": torch.zeros(1)})


def test_numbers_of_no_dimension_keep_their_type() -> None:
    f_lin = linearize(lambda p: p["w"] * 0.5, {"w": torch.tensor(3.0)})
    assert f_lin({"w": torch.tensor(4.0)}).dtype == torch.float32


# --- LinearizedModel: numbers


def test_agrees_with_the_dense_jacobian(problem: Problem) -> None:
    theta = {name: value.detach() for name, value in problem.model.named_parameters()}
    with torch.no_grad():  # where nn.MultiheadAttention would take its fast path
        outputs = pytree.tree_leaves(problem.linearized()(*problem.args, **problem.kwargs))
    expected = problem.expansion(theta)
    assert len(outputs) == len(expected) >= 1
    for value, reference, f0 in zip(outputs, expected, problem.f0, strict=True):
        assert value.dtype == F64
        assert _relative(value, reference) < 1e-10
        assert _relative(f0, reference) > 1e-3  # the linear term matters here


def test_gradients_agree_with_those_of_the_explicit_expansion(problem: Problem) -> None:
    model = problem.linearized()
    outputs = pytree.tree_leaves(model(*problem.args, **problem.kwargs))
    torch.stack([(value**2).mean() for value in outputs]).sum().backward()

    theta = {
        name: value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }
    explicit = problem.expansion(theta)
    torch.stack([(value**2).mean() for value in explicit]).sum().backward()
    scale = max(value.grad.norm().item() for value in theta.values() if value.grad is not None)
    assert scale > 1e-3
    for name, value in theta.items():
        found, expected = model.get_parameter(name).grad, value.grad
        assert found is not None and expected is not None
        assert (found - expected).norm().item() < 1e-10 * scale, name


def test_equals_the_module_at_theta0(problem: Problem) -> None:
    with torch.no_grad():
        outputs = LinearizedModel(problem.init_model)(*problem.args, **problem.kwargs)
    for value, expected in zip(pytree.tree_leaves(outputs), problem.f0, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


def test_inference_mode_changes_nothing(problem: Problem) -> None:
    model = problem.linearized()
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*problem.args, **problem.kwargs))
    with torch.inference_mode():
        args, kwargs = pytree.tree_map(torch.clone, (problem.args, problem.kwargs))
        assert all(value.is_inference() for value in pytree.tree_leaves((args, kwargs)))
        outputs = pytree.tree_leaves(model(*args, **kwargs))
        made_inside = pytree.tree_leaves(problem.linearized()(*args, **kwargs))
    for one, other, third in zip(outputs, made_inside, expected, strict=True):
        assert torch.equal(one, third) and torch.equal(other, third)


def test_outputs_have_the_module_s_own_type() -> None:
    pytest.importorskip("transformers")
    bert, (_, words) = _bert().eval(), _words()
    expected, found = bert(**words), LinearizedModel(bert)(**words)
    assert type(found) is type(expected)
    assert found.pooler_output.shape == expected.pooler_output.shape


def test_a_linear_model_equals_its_linearization() -> None:
    model, x = nn.Linear(5, 3, dtype=F64), torch.randn(4, 5, dtype=F64)
    other = _moved(model, 1.0)
    torch.testing.assert_close(LinearizedModel(other, model)(x), other(x), rtol=1e-12, atol=1e-13)
    assert _relative(model(x), other(x)) > 0.1


def test_tied_weights_count_in_both_places() -> None:
    """f(W) = W'Wx has the derivative (D'W + W'D)x in the direction D."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 3, bias=False, dtype=F64)
            self.decode = nn.Module()
            self.decode.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x) @ self.decode.weight

    model = Tied()
    other, x = _moved(model, 0.5), torch.randn(2, 4, dtype=F64)
    lin = LinearizedModel(other, model)
    w = model.encode.weight.detach()
    d = other.get_parameter("encode.weight").detach() - w
    expected = x @ (w.T @ w + d.T @ w + w.T @ d)
    assert [name for name, _ in lin.named_parameters()] == ["encode.weight"]
    torch.testing.assert_close(lin(x), expected, rtol=1e-12, atol=1e-13)


def test_half_precision_forms_the_step_in_float32() -> None:
    """1 + 2 ** -10 is 1 in bfloat16, so its difference from 1 must be taken before."""
    model, init_model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1 + 2**-10)
    nn.init.ones_(init_model.weight)
    lin = LinearizedModel(model, init_model.to(torch.bfloat16))
    primal, tangent = lin.primal_and_tangent(torch.ones(1, 1, dtype=torch.bfloat16))
    assert primal.dtype == tangent.dtype == torch.bfloat16
    assert (primal.item(), tangent.item()) == (1.0, 2**-10)


def test_half_precision_is_near_the_float64_values() -> None:
    init_model, x = _mlp().to(torch.bfloat16), torch.randn(4, 5, dtype=torch.bfloat16)
    model = _moved(init_model)
    wide = LinearizedModel(copy.deepcopy(model).to(F64), copy.deepcopy(init_model).to(F64))
    found = LinearizedModel(model, init_model)(x)
    assert found.dtype == torch.bfloat16
    assert _relative(found.to(F64), wide(x.to(F64))) < 0.03


def test_primal_and_tangent_take_any_direction() -> None:
    model, x = nn.Linear(2, 3, dtype=F64), torch.randn(4, 2, dtype=F64)
    primal, tangent = LinearizedModel(model).primal_and_tangent(
        x, tangent={"bias": torch.tensor([1.0, 2.0, 3.0], dtype=F64)}
    )
    torch.testing.assert_close(primal, model(x), rtol=1e-12, atol=1e-13)
    assert tangent.tolist() == [[1.0, 2.0, 3.0]] * 4


def test_a_misspelt_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="bais"):
        LinearizedModel(nn.Linear(2, 3)).primal_and_tangent(
            torch.ones(1, 2), tangent={"bais": torch.ones(3)}
        )


# --- LinearizedModel: a module like any other


def test_parameters_are_theta_in_the_module_s_own_order(problem: Problem) -> None:
    model = problem.linearized()
    named = list(problem.model.named_parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in named]
    assert list(model.theta()) == list(model.theta0()) == [name for name, _ in named]
    for (_, expected), theta, theta0 in zip(named, model.params, model.params0, strict=True):
        assert torch.equal(theta, expected) and theta.requires_grad
        assert not torch.equal(theta0, theta) and not theta0.requires_grad
    buffers = {name for name, _ in problem.model.named_buffers()}
    assert {name for name, _ in model.named_buffers()} == buffers  # theta0 is none of them


def test_to_moves_theta_theta0_and_buffers() -> None:
    init_model = _conv()
    model, x = LinearizedModel(_moved(init_model), init_model), torch.randn(2, 3, 6, 6)
    before = model(x)
    assert model.to(F64) is model
    everything = [*model.params, *model.params0, *model.module_buffers().values()]
    assert {value.dtype for value in everything} == {F64, torch.int64}
    after = model(x.to(F64))
    assert after.dtype == F64
    assert 0 < _relative(before.to(F64), after) < 1e-5


def test_state_dict_carries_both_ends() -> None:
    init_model, x = _conv(), torch.randn(2, 3, 6, 6)
    model = LinearizedModel(_moved(init_model), init_model)
    state = copy.deepcopy(model.state_dict())
    own = set(init_model.state_dict())
    assert set(state) == own | {f"theta0.{name}" for name, _ in init_model.named_parameters()}
    other = LinearizedModel(_conv())
    assert _relative(other(x), model(x)) > 1e-3
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


def test_state_dict_works_inside_another_module() -> None:
    model = nn.ModuleDict({"tower": LinearizedModel(_moved(nn.Linear(2, 2)), nn.Linear(2, 2))})
    state = copy.deepcopy(model.state_dict())
    assert set(state) == {
        *("tower.weight", "tower.bias"),
        *("tower.theta0.weight", "tower.theta0.bias"),
    }
    other = nn.ModuleDict({"tower": LinearizedModel(nn.Linear(2, 2))})
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])


def test_bad_state_dicts_are_reported() -> None:
    model = LinearizedModel(nn.Sequential(nn.Linear(2, 2)))
    state = model.state_dict()
    missing = {name: value for name, value in state.items() if name != "theta0.0.weight"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"theta0\.0\.weight"'):
        model.load_state_dict(missing)
    assert model.load_state_dict(missing, strict=False).missing_keys == ["theta0.0.weight"]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"theta0\.1\.weight"'):
        model.load_state_dict({**state, "theta0.1.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=r"theta0\.0\.bias: expected shape \(2,\), got \(3,\)"):
        model.load_state_dict({**state, "theta0.0.bias": torch.zeros(3)})


def test_buffers_that_are_not_saved_stay_unsaved() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("kept", torch.ones(1))
    model.register_buffer("fleeting", torch.ones(1), persistent=False)
    lin = LinearizedModel(model)
    assert set(lin.module_buffers()) == {"kept", "fleeting"}
    assert set(lin.state_dict()) == {"weight", "bias", "kept", "theta0.weight", "theta0.bias"}


def test_the_caller_s_modules_are_left_alone() -> None:
    init_model = nn.Sequential(_conv(), nn.Dropout(0.5)).train()
    model = _moved(init_model).train()
    model.get_parameter("0.0.weight").requires_grad_(False)
    flags = [value.requires_grad for value in model.parameters()]
    before = [copy.deepcopy(module.state_dict()) for module in (model, init_model)]
    lin = LinearizedModel(model, init_model).train()
    optimizer = torch.optim.SGD(lin.parameters(), lr=0.1)
    lin(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()

    for module, state in zip((model, init_model), before, strict=True):
        assert all(part.training for part in module.modules())
        assert all(value.grad is None for value in module.parameters())
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), name
    assert [value.requires_grad for value in model.parameters()] == flags == [False] + [True] * 9
    assert all(value.requires_grad for value in init_model.parameters())
    assert torch.equal(lin.get_parameter("0.0.weight"), before[0]["0.0.weight"])  # frozen
    assert not torch.equal(lin.get_parameter("0.1.weight"), before[0]["0.1.weight"])  # trained
    assert torch.equal(lin.theta0()["0.1.weight"], before[1]["0.1.weight"])


# --- frozen parameters


def _read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each tangent that the engine forms."""
    read, get = list[str](), Displacement.__getitem__

    def recorded(self: Displacement, name: str) -> Tensor:
        value = get(self, name)
        read.append(name)
        return value

    monkeypatch.setattr(Displacement, "__getitem__", recorded)
    return read


def test_frozen_parameters_at_theta0_have_no_tangent_and_no_gradient(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(problem.theta0)
    frozen = set(names[::2])
    model = copy.deepcopy(problem.init_model)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    lin = LinearizedModel(model)
    with torch.no_grad():
        for name in set(names) - frozen:
            lin.get_parameter(name).copy_(problem.model.get_parameter(name))
    read = _read(monkeypatch)
    outputs = pytree.tree_leaves(lin(*problem.args, **problem.kwargs))
    assert read and not frozen & set(read)
    expected = problem.expansion({name: value.detach() for name, value in lin.theta().items()})
    for value, reference in zip(outputs, expected, strict=True):
        assert _relative(value, reference) < 1e-10
    torch.stack([(value**2).mean() for value in outputs]).sum().backward()

    theta = {name: value.detach().clone().requires_grad_() for name, value in lin.theta().items()}
    torch.stack([(value**2).mean() for value in problem.expansion(theta)]).sum().backward()
    scale = max(value.grad.norm().item() for value in theta.values() if value.grad is not None)
    for name, value in lin.named_parameters():
        assert (value.grad is None) is (name in frozen) and value.requires_grad is (
            name not in frozen
        )
        if value.grad is not None:
            grad = theta[name].grad
            assert grad is not None and (value.grad - grad).norm().item() < 1e-10 * scale, name


@checking(False)
def test_frozen_parameters_cost_no_rule_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()
    apply = Duals.apply

    def counted(self: Duals, rule: Any, func: Any, args: Any, kwargs: Any) -> Any:
        out = apply(self, rule, func, args, kwargs)
        calls.extend([func.__name__] * (self.split(out)[1] is not None))
        return out

    monkeypatch.setattr(Duals, "apply", counted)
    model, x = _mlp().to(F64), torch.randn(4, 5, dtype=F64)
    model[:3].requires_grad_(False)  # type: ignore[index]
    lin = LinearizedModel(model)
    lin(x)
    assert calls == ["linear"]  # the last layer
    calls.clear()
    lin.requires_grad_(True)
    lin(x)
    assert calls == ["linear", "tanh", "linear", "gelu", "linear"]
    calls.clear()
    lin.requires_grad_(False)
    assert torch.equal(lin(x), model(x)) and calls == []


MOVES: dict[str, Callable[[LinearizedModel, Tensor], Any]] = {
    "in place": lambda lin, v: lin.get_parameter("0.weight").copy_(v),
    "through data": lambda lin, v: lin.get_parameter("0.weight").data.copy_(v),
    "other data": lambda lin, v: setattr(lin.get_parameter("0.weight"), "data", v),
    "another parameter": lambda lin, v: setattr(
        lin.get_submodule("0"), "weight", nn.Parameter(v, requires_grad=False)
    ),
    "state dict": lambda lin, v: lin.load_state_dict({**lin.state_dict(), "0.weight": v}),
    "theta0": lambda lin, v: lin.load_state_dict(
        {**lin.state_dict(), "0.weight": v, "theta0.0.weight": v + 1}
    ),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_a_frozen_parameter_that_is_moved_takes_part(move: Callable[..., Any]) -> None:
    init_model, x = _mlp().to(F64), torch.randn(4, 5, dtype=F64)
    init_model.requires_grad_(False)
    lin = LinearizedModel(init_model)
    assert torch.equal(lin(x), init_model(x))  # the comparison at theta0 is not remembered
    with torch.no_grad():
        move(lin, _moved(init_model).get_parameter("0.weight"))
    reference = LinearizedModel(init_model).requires_grad_(True)
    reference.load_state_dict(lin.state_dict())
    torch.testing.assert_close(lin(x), reference(x), rtol=1e-12, atol=1e-13)
    assert _relative(lin(x), lin.module0()(x)) > 1e-3
    twin = copy.deepcopy(lin)
    assert torch.equal(twin(x), lin(x)) and not any(p.requires_grad for p in twin.parameters())


def test_flags_are_those_of_the_model_and_come_back_with_the_module() -> None:
    init_model, model, x = _mlp(), _mlp(), torch.randn(4, 5)
    model[0].requires_grad_(False)  # type: ignore[index]
    lin = LinearizedModel(model, init_model)
    flags = [value.requires_grad for value in model.parameters()]
    assert [value.requires_grad for value in lin.params] == flags == [False] * 2 + [True] * 4
    assert [value.requires_grad for value in lin.standard().parameters()] == flags
    reference = LinearizedModel(model, init_model).requires_grad_(True)
    torch.testing.assert_close(lin(x), reference(x))  # theta is not theta0: nothing is left out


def test_swapped_weights_take_part_whatever_their_flags(problem: Problem) -> None:
    lin = LinearizedModel(problem.init_model).requires_grad_(False)
    theta = {name: value.detach() for name, value in problem.model.named_parameters()}
    found = functional_call(lin, theta, problem.args, problem.kwargs)
    for value, reference in zip(pytree.tree_leaves(found), problem.expansion(theta), strict=True):
        assert _relative(value, reference) < 1e-10


def test_train_changes_neither_dropout_nor_statistics() -> None:
    init_model = nn.Sequential(_conv(), nn.Dropout(0.5))
    x = torch.randn(4, 3, 6, 6)
    lin = LinearizedModel(_moved(init_model), init_model)
    expected = lin.eval()(x)
    assert torch.equal(lin.train()(x), expected) and torch.equal(lin(x), expected)
    assert lin.get_buffer("0.1.num_batches_tracked").item() == 0
    assert not torch.equal(init_model.train()(x), init_model(x))  # dropout is at work there


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(duplicate: Callable[[Any], Any]) -> None:
    init_model, x = _conv(), torch.randn(2, 3, 6, 6)
    model = LinearizedModel(_moved(init_model), init_model)
    expected = model(x).detach()
    twin = duplicate(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for value in (*twin.params, *twin.params0):
            value += 1.0
    assert not torch.allclose(twin(x), expected)
    assert torch.equal(model(x), expected)


def test_hooks_run() -> None:
    model, seen = LinearizedModel(nn.Linear(2, 2)), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(model(torch.ones(1, 2)), seen[0])


def test_another_architecture_is_refused_with_all_differences() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    init_model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    message = (
        r"(?s)parameters of model and init_model do not match"
        r".*only in the first: 1\.bias.*only in the first: 1\.weight"
        r".*only in the second: 2\.weight"
        r".*0\.bias: shape \(3,\) against \(4,\).*0\.weight: shape \(3, 2\) against \(4, 2\)"
    )
    with pytest.raises(ValueError, match=message):
        LinearizedModel(model, init_model)


@pytest.mark.parametrize("name", ["params", "theta0"])
def test_a_submodule_may_have_any_name(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule(name)(x)

    model, x = Named(), torch.randn(3, 2)
    assert torch.equal(LinearizedModel(model)(x), model(x))


def test_outputs_may_be_none() -> None:
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
    found, weights = LinearizedModel(model)(x, x, x, need_weights=False)
    assert weights is None
    torch.testing.assert_close(found, model(x, x, x, need_weights=False)[0])


# --- backends


def _backends() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_backends_are_put_back(mode: Callable[[], Any]) -> None:
    with mode():
        outside = _backends()
        with forward_ad_backends():
            assert _backends() == (False, False, True, outside[3], False)
        assert _backends() == outside
        with pytest.raises(KeyError, match="stop"), forward_ad_backends():
            raise KeyError("stop")
        assert _backends() == outside


def test_a_failing_forward_puts_the_backends_back() -> None:
    before = _backends()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        LinearizedModel(nn.Linear(2, 2))(torch.ones(1, 3))
    assert _backends() == before


def test_its_function_and_buffers_as_the_public_class_has_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    linear, x = LinearizedModel(model), torch.randn(5, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    d_params = tuple(p - p0 for p, p0 in zip(linear.params, linear.params0, strict=True))
    pair: Any = torch.func.jvp(
        lambda *params: linear.func0(params, x), tuple(linear.params0), d_params
    )
    torch.testing.assert_close(linear(x), sum(pair))
    assert [b.shape for b in linear.buffers0] == [b.shape for b in model.buffers()]


class TiedBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, pos = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(4)
        self.a.register_buffer("pos", pos)
        self.b.register_buffer("pos", pos)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)) * self.a.get_buffer("pos"))
        return out * self.b.get_buffer("pos")


def _assigned(linear: LinearizedModel, value: Tensor) -> None:
    linear.load_state_dict(linear.state_dict() | {"a.pos": value}, assign=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda linear, value: linear.get_buffer("a.pos").copy_(value),
        lambda linear, value: linear.load_state_dict(linear.state_dict() | {"a.pos": value}),
        _assigned,
    ],
)
def test_tied_buffers_stay_tied(write: Callable[[LinearizedModel, Tensor], Any]) -> None:
    model, x, pos = TiedBuffers(), torch.randn(5, 4, dtype=F64), torch.full((4,), 3.0, dtype=F64)
    linear = LinearizedModel(model).double()
    write(linear, pos)
    reference = TiedBuffers().double()
    reference.load_state_dict({**model.state_dict(), "a.pos": pos, "b.pos": pos})
    for same in (linear, linear.standard()):
        torch.testing.assert_close(same(x), reference(x))
    assert torch.equal(linear.weights()["b.pos"], pos)
    assert torch.equal(linear.weights0()["b.pos"], pos)


def test_a_model_without_values_takes_both_ends_of_a_state_dict() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(x)))
            return out

    source, x = LinearizedModel(_moved(Tied()), Tied()), torch.randn(5, 4)
    with torch.device("meta"):
        linear = LinearizedModel(nn.Sequential(Tied()))
    state = {f"0.{name}": v for name, v in source.state_dict().items() if "theta0" not in name}
    state |= {f"theta0.0.{name}": value for name, value in source.theta0().items()}
    linear.load_state_dict(state, assign=True)
    torch.testing.assert_close(linear(x), source(x))
    assert list(linear.theta0()) == [f"0.{name}" for name in source.theta0()]


@pytest.mark.parametrize("name", ["tangent", "model", "params0", "tangents", "vectors", "x", "v"])
def test_inputs_may_have_any_name(name: str) -> None:
    class Scaled(nn.Linear):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return super().forward(*args) * kwargs[name]

    model, init, batch = Scaled(4, 3), Scaled(4, 3), torch.randn(5, 4)
    scale = {name: torch.tensor(2.0)}
    for check in (False, True):
        linear = LinearizedModel(model, init, check=check)
        torch.testing.assert_close(linear(batch, **scale), model(batch, **scale))
    torch.testing.assert_close(linear.func0(linear.params0, batch, **scale), init(batch, **scale))
    tau = {n: value - linear.theta0()[n] for n, value in linear.theta().items()}
    steps = [linear.tangents(batch, [tau, tau], **scale)[1][1]]
    steps += [jvp(init, {}, tau, batch, **scale)[1], plain_jvp(init, {}, tau, batch, **scale)[1]]
    for step in steps:
        torch.testing.assert_close(step, model(batch, **scale) - init(batch, **scale))


def test_a_parametrisation_of_the_linearised_model_is_refused() -> None:
    linear = LinearizedModel(nn.Sequential(nn.Linear(4, 3)))
    nn.utils.parametrize.register_parametrization(
        linear.get_submodule("0"), "weight", nn.Identity(), unsafe=True
    )
    with pytest.raises(RuntimeError, match=r"expected the parameter '0\.weight'.*linearise that"):
        linear(torch.randn(5, 4))
