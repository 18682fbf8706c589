"""Modules that could be differentiated wrongly without a word are exact or refused by name.

The reference is a central difference in float64 over modules built anew for each evaluation.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import jvp, jvps
from tangent_arithmetic.tangent.linearized import LinearizedModel

F64 = torch.float64


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


class Toy(nn.Module):
    """A module whose forward pass is a function of it and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self._run = run
        for name, value in attributes.items():
            setattr(self, name, copy.deepcopy(value))

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


def cached_in_a_dict(s: Any, x: Tensor) -> Tensor:
    if "k" not in s.c:
        s.c["k"] = s.w.flip(0)
    return s.a(x) * s.c["k"]


def cached_in_an_attribute(s: Any, x: Tensor) -> Tensor:
    if s.k is None:
        s.k = s.w.flip(0)
    return s.a(x) * s.k


def cached_in_an_object(s: Any, x: Tensor) -> Tensor:
    if not s.c.rows:
        s.c.rows.append(s.w.flip(0))
    return s.a(x) * s.c.rows[0]


def cached_in_a_new_buffer(s: Any, x: Tensor) -> Tensor:
    if "k" not in s._buffers:
        s.register_buffer("k", s.w.flip(0), persistent=False)
    return s.a(x) * s.k


def with_buffer(run: Callable[[Any, Tensor], Any], name: str, value: Tensor | None) -> nn.Module:
    model = Toy(run)
    model.register_buffer(name, value)
    return model


class Rows:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []


def compiled(s: Any, x: Tensor) -> Tensor:
    return x + _sin(s.a(x))


@torch.compile(backend="aot_eager")
def _sin(z: Tensor) -> Tensor:
    return torch.sin(z) * 2


def forces(s: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = torch.tanh(s.a(x)).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def vmapped(s: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: s.a(row) * s.w)(x)


def gradient_of_torch_func(s: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: torch.tanh(s.a(row)).square().sum()))(x)


def masked_by_a_subclass(s: Any, x: Tensor) -> Tensor:
    q, k = s.a(x[:3])[None], s.a(x)[None]
    return F.scaled_dot_product_attention(q, k, k * s.w, attn_mask=causal_lower_right(3, 5))


def complex_output(s: Any, x: Tensor) -> Any:
    return torch.fft.rfft(s.a(x) * s.w), x.sum()


def complex_inside(s: Any, x: Tensor) -> Tensor:
    z = torch.fft.fft(s.a(x)) * torch.sigmoid(torch.complex(s.w, s.w))
    return torch.view_as_real(torch.tanh(z))


with warnings.catch_warnings():  # TorchScript is deprecated, and still in libraries
    warnings.simplefilter("ignore")

    @torch.jit.script
    def _scripted(z: Tensor, w: Tensor) -> Tensor:
        return torch.sigmoid(z * w) * torch.tanh(z)


def scripted(s: Any, x: Tensor) -> Tensor:
    return _scripted(s.a(x), s.w)


def regions(s: Any, x: Tensor) -> Tensor:
    torchvision = pytest.importorskip("torchvision")
    pictures = F.linear(x, s.a.weight, s.a.bias).reshape(1, 1, 5, 4) * s.w
    boxes = torch.tensor([[0.0, 0.3, 0.2, 3.1, 3.7]])
    pooled: Tensor = torchvision.ops.roi_align(pictures, boxes, (2, 2))
    return pooled


def deformed(s: Any, x: Tensor) -> Tensor:
    torchvision = pytest.importorskip("torchvision")
    kernel = s.a.weight.reshape(1, 1, 4, 4)[..., :2, :2] * s.w[0]
    offset = torch.linspace(-0.7, 0.4, 8 * 12).reshape(1, 8, 4, 3)
    out: Tensor = torchvision.ops.deform_conv2d(x.reshape(1, 1, 5, 4), offset, kernel, s.a.bias[:1])
    return out


def changes_its_input(s: Any, x: Tensor) -> Tensor:
    return torch.tanh(s.a(x.sub_(0.5))) * s.w


def counts_in_a_buffer(s: Any, x: Tensor) -> Tensor:
    s.n = s.n + 1
    return s.a(x) * s.w


def sparse_neighbours(s: Any, x: Tensor) -> Tensor:
    return torch.relu(s.adj @ s.a(x)) * s.w + torch.sparse.mm(s.adj, x * s.w)


def parameters_read_at_once(s: Any, x: Tensor) -> Tensor:
    weights = dict(s.a._parameters)
    return F.linear(x, weights["weight"], weights["bias"]) * s.w


def read_by_functional_call(s: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(s.a, dict(s.a.named_parameters()), (x * s.w,))
    return out


ADJACENCY = (torch.rand(5, 5) < 0.5).to(F64).to_sparse()
EXACT: dict[str, Callable[[], nn.Module]] = {
    "cache in a dict": lambda: Toy(cached_in_a_dict, c={}),
    "cache in an attribute": lambda: Toy(cached_in_an_attribute, k=None),
    "cache in an object": lambda: Toy(cached_in_an_object, c=Rows()),
    "cache in a buffer": lambda: with_buffer(cached_in_an_attribute, "k", None),
    "cache in a new buffer": lambda: Toy(cached_in_a_new_buffer),
    "compiled": lambda: Toy(compiled),
    "forces": lambda: Toy(forces),
    "vmap inside": lambda: Toy(vmapped),
    "grad of torch.func inside": lambda: Toy(gradient_of_torch_func),
    "subclass as mask": lambda: Toy(masked_by_a_subclass),
    "complex output": lambda: Toy(complex_output),
    "complex inside": lambda: Toy(complex_inside),
    "scripted function": lambda: Toy(scripted),
    "roi_align": lambda: Toy(regions),
    "deform_conv2d": lambda: Toy(deformed),
    "changes its input": lambda: Toy(changes_its_input),
    "sparse": lambda: Toy(sparse_neighbours, adj=ADJACENCY),
    "parameters read at once": lambda: Toy(parameters_read_at_once),
    "functional_call inside": lambda: Toy(read_by_functional_call),
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def directions(theta0: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(v.shape, generator=random, dtype=F64) for name, v in theta0.items()}


def difference(make: Callable[[], nn.Module], theta0: Any, v: Any, x: Tensor) -> list[Tensor]:
    """The central difference of a module's outputs along v, each from a new module."""

    def at(t: float) -> list[Tensor]:
        model = make().eval()
        model.load_state_dict({n: theta0[n] + t * v[n] for n in theta0}, strict=False)
        return [out.detach() for out in pytree.tree_leaves(model(x.clone()))]

    return [(p - m) / 2e-5 for p, m in zip(at(1e-5), at(-1e-5), strict=True)]


def assert_near(actual: Any, expected: Any) -> None:
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a.detach(), e, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_the_tangent_is_exact_on_each_call(name: str, learnt: bool) -> None:
    make, x = EXACT[name], torch.randn(5, 4)
    model = make().eval()
    theta0 = weights(model)
    v = {n: t.requires_grad_(learnt) for n, t in directions(theta0).items()}
    expected = difference(make, theta0, v, x)
    for _ in range(2):
        _, d_out = jvp(model, theta0, v, x.clone())
        assert_near(d_out, expected)
    with torch.no_grad():
        other = directions(theta0, 2)
        _, several = jvps(model, theta0, [v, other], x.clone())
        assert_near(several[0], expected)
        assert_near(several[1], difference(make, theta0, other, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_exact_after_a_step_of_training(name: str) -> None:
    """The gradient of a loss of f_lin along u is the loss's derivative by differences."""
    make, x = EXACT[name], torch.randn(5, 4)
    linear = LinearizedModel(make().eval())
    theta0 = weights(linear.module0())
    optimizer = torch.optim.SGD(linear.parameters(), 0.01)

    def loss(out: Any) -> Tensor:
        leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        return torch.stack([leaf.abs().square().sum() for leaf in leaves]).sum()

    for _ in range(2):
        optimizer.zero_grad()
        loss(linear(x.clone())).backward()
        u = directions(theta0, 3)
        slope = sum(
            (p.grad * u[n]).sum() for n, p in linear.named_parameters() if p.grad is not None
        )
        f_lin = pytree.tree_leaves(linear(x.clone()))
        steps = difference(make, theta0, u, x)
        expected = sum(
            2 * (f.detach() * d.conj()).real.sum() if f.is_complex() else 2 * (f.detach() * d).sum()
            for f, d in zip(f_lin, steps, strict=True)
        )
        torch.testing.assert_close(
            torch.as_tensor(slope), torch.as_tensor(expected), rtol=1e-5, atol=1e-7
        )
        optimizer.step()


CACHES = [name for name in EXACT if name.startswith("cache in")]


@pytest.mark.parametrize("name", [name for name in CACHES if "new" not in name])
@pytest.mark.parametrize("grad", [False, True])
def test_a_cache_filled_before_is_filled_anew(name: str, grad: bool) -> None:
    make, x = EXACT[name], torch.randn(5, 4)
    model = make().eval()
    with torch.set_grad_enabled(grad):
        model(x)
    linear, theta0 = LinearizedModel(model), weights(model)
    v = directions(theta0)
    _, d_out = linear.primal_and_tangent(x, tangent=v)
    assert_near(d_out, difference(make, theta0, v, x))
    _, d_out = jvp(model, theta0, v, x)
    assert_near(d_out, difference(make, theta0, v, x))


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_filled_anew_in_pytorchs_forward_ad(name: str) -> None:
    make, x = EXACT[name], torch.randn(5, 4)
    linear = LinearizedModel(make())
    theta0 = weights(linear.module0())
    v = directions(theta0)
    expected = difference(make, theta0, v, x)
    for _ in range(2):
        _, d_out = linear.primal_and_tangent(x.clone().requires_grad_(), tangent=v)
        assert_near(d_out, expected)

    def loss(theta: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(linear, theta, (x,)).square().sum()
        return out

    theta = {name: p.detach() for name, p in linear.named_parameters()}
    grads = torch.func.grad(loss)(theta)
    linear = copy.deepcopy(linear)  # nothing of the transform is left
    linear(x).square().sum().backward()
    assert_near(list(grads.values()), [p.grad for p in linear.parameters()])


@pytest.mark.parametrize("steps", [1, 2])
def test_buffers_with_caches_among_statistics(steps: int) -> None:
    """A cache that is filled before is found among buffers that are none."""

    def make() -> nn.Module:
        caches = [with_buffer(cached_in_an_attribute, "k", None) for _ in range(steps)]
        return nn.Sequential(nn.BatchNorm1d(4), *caches, nn.BatchNorm1d(4)).eval()

    model, x = make(), torch.randn(5, 4)
    model(x)
    linear, theta0 = LinearizedModel(model), weights(model)
    v = directions(theta0)
    for _ in range(2):
        _, d_out = linear.primal_and_tangent(x, tangent=v)
        assert_near(d_out, difference(make, theta0, v, x))


def test_constants_in_attributes_stay() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.a(x) * s.scale * s.table["row"]

    model = Toy(run, scale=torch.randn(4), table={"row": torch.randn(4)}).eval()
    x, theta0 = torch.randn(5, 4), weights(model)
    v = directions(theta0)
    _, d_out = jvp(model, theta0, v, x)
    assert_near(d_out, difference(lambda: model, theta0, v, x))
    assert "row" in model.table and model.scale is not None  # type: ignore[operator]


def keeps_its_state(s: Any, x: Tensor) -> Tensor:
    s.h = torch.tanh(s.a(x) + s.h)
    return s.h * s.w


def keeps_a_mean(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    s.n = 0.9 * s.n + 0.1 * h.mean()
    return h - s.n


class Hidden:
    def __init__(self, value: Tensor) -> None:
        self.inner = {"deep": [value]}


@dataclasses.dataclass
class Record:
    values: list[Any]


@dataclasses.dataclass(slots=True)
class Slotted:
    value: Tensor


def through_numpy(s: Any, x: Tensor) -> Tensor:
    return s.a(x) + torch.from_numpy(s.w.detach().numpy()).to(x) * x


@pytest.mark.parametrize("learnt", [False, True])
def test_products_of_experts_are_those_of_their_rows(learnt: bool) -> None:
    class Experts(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 256, dtype=torch.float32).reshape(2, 16, 8))
            self.a, self.together = nn.Linear(16, 16, dtype=torch.float32), together

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if not self.together:
                return torch.cat([x[:2] @ self.w[0], x[2:] @ self.w[1]])
            return torch._grouped_mm(x, self.w, offs=torch.tensor([2, 5], dtype=torch.int32))

    models, x = [Experts(True), Experts(False)], torch.randn(5, 16, dtype=torch.float32)
    models[1].load_state_dict(models[0].state_dict())
    theta0 = weights(models[0])
    results = []
    for model in models:
        v = {n: t.float().requires_grad_(learnt) for n, t in directions(theta0).items()}
        _, d_out = jvp(model, theta0, v, x)
        grads = torch.autograd.grad(d_out.square().sum(), list(v.values())) if learnt else []
        results.append([d_out.detach(), *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def holding(run: Callable[[Any, Tensor], Any]) -> nn.Module:
    model: Any = Toy(run)
    model.tied = [model.w]
    return cast(nn.Module, model)


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "hidden state": (lambda: Toy(keeps_its_state, h=torch.zeros(4)), RuntimeError, "keeps 'h'"),
    "tensors in an object": (
        lambda: Toy(lambda s, x: (s.a(x), Hidden(s.w))), TypeError, "Hidden with tensors"
    ),
    "tensors in a dataclass": (
        lambda: Toy(lambda s, x: (s.a(x), Record([s.w]))), TypeError, "Record with tensors"
    ),
    "tensors in slots": (
        lambda: Toy(lambda s, x: (s.a(x), Slotted(s.w))), TypeError, "Slotted with tensors"
    ),
    "tensors in a frozen set": (
        lambda: Toy(lambda s, x: (s.a(x), frozenset([s.w]))), TypeError, "frozenset with tensors"
    ),
    "tensors far inside": (
        lambda: Toy(lambda s, x: (s.a(x), Record([[{"a": [{"b": s.w}]}]]))),
        TypeError,
        "Record with tensors",
    ),
    "a dict of another kind": (
        lambda: Toy(lambda s, x: (s.a(x), UserDict(a=s.w))), TypeError, "UserDict with tensors"
    ),
    "a distribution": (
        lambda: Toy(lambda s, x: (s.a(x), torch.distributions.Categorical(logits=s.w))),
        TypeError,
        "Categorical with tensors",
    ),
    "an embedding that limits its norms": (
        lambda: Toy(lambda s, x: F.embedding(x.argmax(-1), s.a.weight, max_norm=0.1) * s.w),
        RuntimeError,
        "changes 'a.weight' in place",
    ),
    "a parameter in a list": (
        lambda: holding(lambda s, x: s.a(x) * s.tied[0]), RuntimeError, "'tied', which holds 'w'"
    ),
    "weights changed in place": (
        lambda: Toy(lambda s, x: s.a(x) * s.w.mul_(0.9)), RuntimeError, "changes 'w' in place"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name: str) -> None:
    make, error, match = REFUSED[name]
    model, x = make().eval(), torch.randn(5, 4)
    theta0 = weights(model)
    with pytest.raises(error, match=match), torch.no_grad():
        jvp(model, theta0, directions(theta0), x)


def test_a_parameter_in_a_list_that_does_not_move_is_a_constant() -> None:
    model, x = holding(lambda s, x: s.a(x) * s.tied[0]), torch.randn(5, 4)
    theta0 = weights(model)
    v = {"a.bias": torch.randn(4)}
    assert_near(jvp(model, theta0, v, x)[1], (v["a.bias"] * theta0["w"]).expand(5, 4))


def enclosing(wrap: Callable[[Any], Any]) -> nn.Module:
    """A module whose attribute `head` is made of its layer `a`."""
    model: Any = Toy(lambda s, x: s.head(x) * s.w)
    model.head = wrap(model)
    return cast(nn.Module, model)


class Heads:
    def __init__(self, head: Any) -> None:
        self.heads = [head]

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads[0](x)
        return out


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: lambda x: s.a(x),
        lambda s: lambda x, a=s.a: a(x),
        lambda s: functools.partial(lambda weight, x: F.linear(x, s.a.weight * weight), 2.0),
        lambda s: Heads(functools.wraps(s.a.forward)(_calling(s.a.forward))),
    ],
)
def test_functions_that_enclose_a_part_of_the_module_are_refused(wrap: Any) -> None:
    with pytest.raises(ValueError, match="enclose parts of it in head"):
        LinearizedModel(enclosing(wrap))


def test_hooks_that_enclose_a_part_of_the_module_are_refused() -> None:
    model: Any = Toy(lambda s, x: s.a(x) * s.w)
    model.a.register_forward_hook(lambda m, args, out: out + m.weight.sum() + model.w)
    with pytest.raises(ValueError, match=r"enclose parts of it in a\._forward_hooks"):
        LinearizedModel(model)


def test_hooks_that_enclose_nothing_of_the_module_are_copied() -> None:
    model: Any = Toy(lambda s, x: s.a(x) * s.w)
    seen = list[Tensor]()

    def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(out)
        return 2 * out

    model.a.register_forward_hook(doubled)
    x = torch.randn(5, 4)
    torch.testing.assert_close(LinearizedModel(model)(x), model(x))
    assert seen


def _calling(function: Any) -> Any:
    return lambda x: function(x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s.a.forward,
        lambda s: functools.partial(s.a),
        lambda s: Heads(s.a),
        lambda s: _calling(torch.tanh),
    ],
)
def test_what_a_copy_can_follow_is_exact(wrap: Any) -> None:
    model, other = enclosing(wrap), enclosing(wrap)
    x, theta0, theta = torch.randn(5, 4), weights(model), weights(other)
    linear = LinearizedModel(other, model)
    v = {name: theta[name] - theta0[name] for name in theta}
    expected = difference(lambda: enclosing(wrap), theta0, v, x)
    assert_near(linear(x) - model(x), expected)


@pytest.mark.parametrize("learnt", [False, True])
def test_a_state_in_a_buffer_is_refused(learnt: bool) -> None:
    model, x = with_buffer(keeps_a_mean, "n", torch.tensor(0.5)), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="keeps 'n'"):
        jvp(model, weights(model), directions(weights(model)), x.requires_grad_(learnt))


def test_weights_come_back_if_a_buffer_grows() -> None:
    def grows(s: Any, x: Tensor) -> Tensor:
        s.n = torch.cat([s.n, s.n])
        return s.a(x) * s.w

    model = with_buffer(grows, "n", torch.zeros(1))
    values = {**weights(model), "n": torch.ones(1)}
    with pytest.raises(RuntimeError, match="keeps the shape of its buffers"):
        jvp(model, values, directions(weights(model)), torch.randn(5, 4))
    assert {type(value) for value in model.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_a_buffer_that_is_assigned_keeps_its_value(times: int, learnt: bool) -> None:
    counts = with_buffer(counts_in_a_buffer, "n", torch.zeros(()))
    linear = LinearizedModel(nn.Sequential(*[counts] * times))
    for expected in (times, 2 * times):
        linear(torch.randn(5, 4, requires_grad=learnt))
        assert linear.module_buffers()["0.n"] == expected == linear.standard().get_buffer("0.n")


def test_results_share_no_memory_with_the_directions() -> None:
    model = Toy(lambda s, x: s.w)
    theta0 = weights(model)
    v = directions(theta0)
    _, d_out = jvp(model, theta0, v, torch.randn(5, 4))
    d_out.zero_()
    assert v["w"].abs().min() > 0


@pytest.mark.parametrize("assign", [False, True])
def test_statistics_loaded_after_a_copy_reach_the_standard_model(assign: bool) -> None:
    linear = LinearizedModel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).float()).double()
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    state["1.running_mean"] += 3
    linear.load_state_dict(state, assign=assign)
    x = torch.randn(5, 4)
    for model in (linear.standard(), linear.module0()):
        assert torch.equal(model.get_buffer("1.running_mean"), state["1.running_mean"])
    torch.testing.assert_close(linear(x), linear.standard().eval()(x))


def test_threads_take_turns() -> None:
    models = [LinearizedModel(EXACT["compiled"]().eval()) for _ in range(2)]
    x, errors = torch.randn(64, 4), list[BaseException]()
    expected = [m(x).detach() for m in models]

    def work(model: LinearizedModel, out: Tensor) -> None:
        try:
            for _ in range(20):
                assert torch.equal(model(x), out)
        except BaseException as error:
            errors.append(error)

    jobs = [(m, e) for m, e in zip(models, expected, strict=True) for _ in range(2)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_integer_parameters_are_no_weights_to_differentiate() -> None:
    model = Toy(lambda s, x: s.a(x) * s.q * s.w)
    model.q = nn.Parameter(torch.tensor([1, 2, 3, 4]), requires_grad=False)
    linear, x = LinearizedModel(model), torch.randn(5, 4)
    torch.testing.assert_close(linear(x), model(x))
    v = {name: t for name, t in directions(weights(model)).items() if name != "q"}
    _, d_out = linear.primal_and_tangent(x, tangent=v)
    theta0 = {name: t for name, t in weights(model).items() if name != "q"}
    assert_near(d_out, difference(lambda: model, theta0, v, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_submodules_take_forward_ad() -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
        return nn.Sequential(nn.Linear(4, 4), torch.jit.script(block), nn.Linear(4, 2)).eval()

    linear, x = LinearizedModel(make()), torch.randn(5, 4)
    theta0 = weights(linear.module0())
    v = directions(theta0)
    _, d_out = linear.primal_and_tangent(x, tangent=v)
    assert_near(d_out, difference(make, theta0, v, x))


def test_hooks_on_backward_passes_see_the_gradient() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), list[Any]()
    expected = LinearizedModel(copy.deepcopy(model))
    model[1].register_full_backward_hook(lambda _, __, grads: seen.append(grads))
    linear, x = LinearizedModel(model), torch.randn(5, 4)
    for one in (linear, expected):
        one(x).sum().backward()
    assert seen[-1][0].shape == (5, 4)
    for p, q in zip(linear.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_parameters_on_the_meta_device_are_refused() -> None:
    model = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        jvp(model, {}, {}, torch.randn(5, 4))


def test_batch_norm_of_one_example_has_the_gradient_of_each_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2)).eval()
    model[1].running_mean.uniform_()  # type: ignore[operator]
    x, u = torch.randn(1, 3, 6, 6), torch.randn(1, 16, 8).transpose(1, 2)
    theta0, gradients = weights(model), []
    for g in (u, u.contiguous()):
        v = {n: t.requires_grad_() for n, t in directions(theta0).items()}
        (jvp(model, theta0, v, x)[1] * g).sum().backward()
        gradients.append([t.grad for t in v.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("function", [F.glu, F.hardsigmoid, F.hardswish, F.softplus, F.elu, F.mish])
def test_gradients_in_an_input_that_requires_grad_are_exact(function: Any) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), Wrapped(function), nn.Linear(4 - 2 * (function is F.glu), 2)
    )
    theta0 = weights(model)
    v, x = directions(theta0), torch.randn(5, 4, requires_grad=True)
    _, d_out = jvp(model, theta0, v, x)
    (grad,) = torch.autograd.grad(d_out.sum(), x)
    u = torch.randn(5, 4)
    with torch.no_grad():
        sums = [jvp(model, theta0, v, x + t * u)[1].sum() for t in (1e-5, -1e-5)]
    torch.testing.assert_close((grad * u).sum(), (sums[0] - sums[1]) / 2e-5, rtol=1e-6, atol=1e-8)


@dataclasses.dataclass
class Example:
    x: Tensor


class Graph:
    """As in torch_geometric: callable, with its tensors two levels down."""

    def __init__(self, x: Tensor) -> None:
        self._store = Record([x])

    def __call__(self) -> None: ...

    @property
    def x(self) -> Tensor:
        return self._store.values[0]


@pytest.mark.parametrize("kind", [Example, Graph, None])
def test_gradients_in_tensors_that_no_tree_shows_are_exact(kind: Any) -> None:
    """Of an object that is the input, or of an attribute of the module."""

    def run(s: Any, example: Any) -> Tensor:
        return torch.tanh(s.a(s.prompt if kind is None else example.x)) * s.w

    model: Any = LinearizedModel(Toy(run), Toy(run))
    x, u = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)

    def out(x: Tensor) -> Tensor:
        model.module0().prompt = x
        total: Tensor = model(None if kind is None else kind(x)).sum()
        return total

    (grad,) = torch.autograd.grad(out(x), x)
    with torch.no_grad():
        slope = (out(x + 1e-5 * u) - out(x - 1e-5 * u)) / 2e-5
    torch.testing.assert_close((grad * u).sum(), slope, rtol=1e-6, atol=1e-8)


class Wrapped(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
