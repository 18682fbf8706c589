"""Several directions in one pass: exact, one by one or together, at the price of their arithmetic.

The reference is `torch.func.jvp` along each direction, in float64.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tangent_arithmetic.tangent import at_once, checking, jvp, jvps, memory, plain_jvp
from tangent_arithmetic.tangent.rules import RULES, Pushes

F64, BAR = torch.float64, 1e-10
Vectors = list[dict[str, Tensor]]


def open_clip_tower() -> tuple[nn.Module, Any]:
    import open_clip

    vision = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(16, vision, text).visual, torch.randn(3, 3, 16, 16, dtype=F64)


def residual_network() -> tuple[nn.Module, Any]:
    from torchvision.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    for name, value in model.named_buffers():
        if "running" in name:
            value.add_(torch.rand_like(value))
    return model, torch.randn(2, 3, 32, 32, dtype=F64)


def timm_transformer() -> tuple[nn.Module, Any]:
    import timm

    options: dict[str, Any] = {
        "img_size": 32,
        "depth": 2,
        "embed_dim": 24,
        "num_heads": 3,
        "num_classes": 4,
    }
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    return model, torch.randn(2, 3, 32, 32, dtype=F64)


def bert() -> tuple[nn.Module, Any]:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(num_hidden_layers=2, vocab_size=40, **sizes)
    return transformers.BertModel(config), torch.randint(3, 40, (2, 7))


class Recurrent(nn.Module):
    """Two layers of LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.lstm(x)[0])


def recurrent() -> tuple[nn.Module, Any]:
    return Recurrent(), torch.randn(2, 7, 5, dtype=F64)


MODELS = (open_clip_tower, residual_network, timm_transformer, bert, recurrent)


def built(build: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, x = build()
    model = model.to(F64).eval().requires_grad_(False)
    for value in model.parameters():  # such as the ones that scales start from
        value.add_(0.1 * torch.randn_like(value))
    return model, x


def weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * torch.randn(value.shape, generator=random, dtype=value.dtype)
        for name, value in model.named_parameters()
    }


def whole(model: nn.Module) -> Vectors:
    return [direction(model, 1), direction(model, 2)]


def by_block(model: nn.Module) -> Vectors:
    def block(name: str) -> str:
        found = re.match(r".*?\.\d+\.|layer\d", name)
        return found[0] if found else "rest"

    blocks = dict.fromkeys(map(block, weights(model)))
    return [{n: v for n, v in tau.items() if block(n) == b} for tau in whole(model) for b in blocks]


def by_parameter(model: nn.Module) -> Vectors:
    return [{name: value} for name, value in direction(model, 1).items()][::-1]


def overlapping(model: nn.Module) -> Vectors:
    tau = direction(model, 1)
    names = list(tau)
    return [{n: tau[n] for n in names[i : i + 6]} for i in range(0, len(names), 4)] + [tau]


def empty(model: nn.Module) -> Vectors:
    tau = direction(model, 1)
    return [{}, {name: tau[name] for name in list(tau)[:2]}, {}]


GROUPS = (whole, by_block, by_parameter, overlapping, empty)


def tensors(tree: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(tree) if isinstance(v, Tensor)]


def error(found: Any, expected: Any) -> float:
    a, b = (torch.cat([v.flatten() for v in tensors(tree)]) for tree in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-6)) if b.any() else float(a.abs().max())


def check(model: nn.Module, vectors: Vectors, x: Any) -> None:
    with torch.no_grad():
        out, steps = jvps(model, weights(model), vectors, x)
        assert error(out, model(x)) < BAR
        assert len(steps) == len(vectors)
        for v, step in zip(vectors, steps, strict=True):
            zero = {next(iter(weights(model))): torch.zeros_like(next(model.parameters()))}
            assert error(step, plain_jvp(model, weights(model), v or zero, x)[1]) < BAR


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_each_direction_is_exact_and_all_share_a_pass(build: Any, group: Any) -> None:
    model, x = built(build)
    vectors, calls = group(model), []
    check(model, vectors, x)
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        jvps(model, weights(model), vectors, x)
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("build", [open_clip_tower, residual_network], ids=lambda b: b.__name__)
def test_float32_agrees_to_rounding(build: Any) -> None:
    model, x = built(build)
    vectors = by_block(model)
    with torch.no_grad():
        expected = jvps(model, weights(model), vectors, x)[1]
        model = model.float()
        found = jvps(model, weights(model), vectors, x.float())[1]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and error(one, other) < 2e-5


class Odd(nn.Module):
    """Operations without a rule, in place, of two moved values, on views and on joins."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4, dtype=F64))
        self.bank = nn.Parameter(torch.randn(2, 6, 4, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.first(x), self.second(x)
        y = y + 0  # memory of its own
        y += z  # moves along more directions than before
        y = torch.relu_(y)
        a, b = torch.cat([y, x, z * self.scale], dim=1).split([6, 6], dim=1)
        c = torch.cosh(a) / (2 + b.square()) - 3 * b.flip(0)  # cosh and flip have no rule
        d = (1 - c).unflatten(1, (2, 3)).transpose(1, 2).reshape(len(x), 6)
        d = d @ self.bank[0] + torch.einsum("bi,ij->bj", d, self.bank[1]).softmax(-1)
        return torch.stack([d, self.scale.expand(len(x), 4) - d]).sum(0)[..., :3].T


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_odd_operations_are_exact(group: Any) -> None:
    model, x = built(lambda: (Odd(), torch.randn(5, 4, dtype=F64)))
    check(model, group(model), x)


def test_memory_that_values_share_takes_a_pass_per_direction() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            part = y[:, :2]
            part += self.other(x)  # y too
            return y.sin()

    model, x = built(lambda: (Views(), torch.randn(3, 4, dtype=F64)))
    with checking(False):  # which would notice, too
        check(model, by_parameter(model), x)


class Counted(TorchDispatchMode):
    """Counts the multiply-adds of matrix products and attention."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.total += left.numel() * right.shape[-1]
        elif "attention" in name:
            query, key = args[:2]
            self.total += 2 * query.numel() * key.shape[-2]
        elif name == "convolution":
            self.total += out.numel() * args[1][0].numel()
        return out


def products(function: Callable[[], Any]) -> int:
    with torch.no_grad(), checking(False), Counted() as counted:
        function()
    return counted.total


def test_equal_layers_cost_their_bound() -> None:
    tasks, layers, batch = 3, 5, 7
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))).to(F64).requires_grad_(False)
    x = torch.randn(batch, 6, dtype=F64)
    forward = products(lambda: model(x))
    assert forward == layers * batch * 36
    taus = [direction(model, seed) for seed in range(tasks)]
    split = [{n: tau[n] for n in tau if n[0] == str(k)} for tau in taus for k in range(layers)]
    found = products(lambda: jvps(model, weights(model), split, x))
    assert found == (1 + tasks + tasks * (layers - 1) / 2) * forward
    found = products(lambda: jvps(model, weights(model), taus, x))
    assert found == (1 + 2 * tasks - tasks / layers) * forward  # the images do not move


def test_a_transformer_costs_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block a direction also moves what the block's later layers are given: T units more."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    tasks, layers = 3, 2
    model, x = built(open_clip_tower)
    forward = products(lambda: model(x))
    taus = [direction(model, seed) for seed in range(tasks)]
    blocks = [
        {n: v for n, v in tau.items() if f"resblocks.{k}." in n}
        for tau in taus
        for k in range(layers)
    ]
    found = products(lambda: jvps(model, weights(model), blocks, x))
    assert found <= (1 + 2 * tasks + tasks * (layers - 1) / 2) * forward
    found = products(lambda: jvps(model, weights(model), taus, x))
    assert found <= (1 + 2 * tasks) * forward * 1.02  # the tangent needs the scores again
    separate = products(lambda: [jvp(model, weights(model), tau, x) for tau in taus])
    assert found < 0.8 * separate


@pytest.mark.parametrize(("count", "passes"), [(None, 1), (7, 1), (3, 3), (1, 7)])
def test_at_most_so_many_directions_share_a_pass(count: int | None, passes: int) -> None:
    model, x = built(lambda: (Odd(), torch.randn(5, 4, dtype=F64)))
    vectors, calls = [*by_parameter(model), direction(model, 3)], []
    expected = jvps(model, weights(model), vectors, x)[1]
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), at_once(count):
        found = jvps(model, weights(model), vectors, x)[1]
    hook.remove()
    assert len(calls) == passes
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < BAR


def test_no_direction_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="positive number of directions at once, got 0"):  # noqa: SIM117
        with at_once(0):
            pass


def test_results_share_no_memory() -> None:
    model, x = built(lambda: (nn.Linear(4, 4), torch.randn(3, 4, dtype=F64)))
    vectors = whole(model)
    with torch.no_grad():
        one, other = jvps(model, weights(model), vectors, x)[1]
        copies = [other.clone(), *(v.clone() for v in vectors[1].values())]
        one.zero_()
    for value, copy in zip([other, *vectors[1].values()], copies, strict=True):
        assert torch.equal(value, copy)


def test_a_wrong_rule_for_several_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sinh(x: Tensor) -> Any:
        one = lambda d: torch.cosh(x) * d(x)  # noqa: E731
        return torch.sinh(x), Pushes(one, lambda d: torch.sinh(x) * d(x).values)  # type: ignore[union-attr]

    class Hyperbolic(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinh(super().forward(x))

    monkeypatch.setitem(RULES, torch.sinh, sinh)
    model, x = built(lambda: (Hyperbolic(4, 3), torch.randn(5, 4, dtype=F64)))
    with caplog.at_level(logging.WARNING):
        check(model, whole(model), x)
    assert "several directions at once" in caplog.text


def test_a_rule_for_one_direction_serves_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def sinh(x: Tensor) -> Any:
        return torch.sinh(x), lambda d: torch.cosh(x) * d(x)

    class Hyperbolic(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinh(super().forward(x))

    monkeypatch.setitem(RULES, torch.sinh, sinh)
    model, x = built(lambda: (Hyperbolic(4, 3), torch.randn(5, 4, dtype=F64)))
    check(model, by_parameter(model), x)


def test_half_precision_follows_the_single_pass() -> None:
    model, x = built(open_clip_tower)
    model, x = model.float(), x.float()
    vectors = by_block(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        steps = jvps(model, weights(model), vectors, x)[1]
        for v, step in zip(vectors, steps, strict=True):
            assert error(step.float(), jvp(model, weights(model), v, x)[1].float()) < 0.05


def test_a_recurrent_layer_may_stay_after_it_has_moved() -> None:
    model, x = built(recurrent)
    other = built(recurrent)[0]  # functional_call leaves its weights in the layer's list
    with torch.no_grad():
        for v in (direction(model, 1), *by_parameter(model)):
            step = jvp(model, weights(model), v, x)[1]
            assert error(step, plain_jvp(other, weights(model), v, x)[1]) < BAR


def test_memory_is_kept_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self) -> None:
            self.calls: list[tuple[int, ...]] = []

        def mallopt(self, *setting: int) -> None:
            self.calls.append(setting)

        def malloc_trim(self, pad: int) -> None:
            self.calls.append((pad,))

    library = Library()
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    with pytest.raises(KeyError, match="inside"), memory.freed_memory_kept():
        assert library.calls == [(-1, -1), (-4, 0)]
        raise KeyError("inside")
    assert dict(c for c in library.calls[2:4] if len(c) == 2) == memory.USUAL
    assert library.calls[4:] == [(0,)]


def test_functional_inputs_without_tangents_stay_as_they_are() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return F.log_softmax(self.layer(self.rows(ids).mean(1)), -1)

    model, ids = built(lambda: (Table(), torch.randint(0, 9, (3, 5))))
    check(model, by_parameter(model), ids)
