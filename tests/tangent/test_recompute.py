"""Activation checkpointing inside linearised models: the same gradients in less memory."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tangent_arithmetic.tangent import backends
from tangent_arithmetic.tangent.linearized import LinearizedModel

F64 = torch.float64


class Stack(nn.Module):
    """Blocks with dropout, batch norm, a tied weight and a tuple of outputs."""

    def __init__(self, how: str, depth: int = 4, width: int = 6) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm, self.dropout = nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.tied = self.blocks[0]

    def block(self, x: Tensor, layer: nn.Module, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.dropout(torch.tanh(layer(x))) * scale + self.tied(x)
        return self.norm(h), h.argmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sequential":
            out: Tensor = checkpoint_sequential(
                list(self.blocks), 2, torch.tanh(x), use_reentrant=False
            )
            return out
        for layer in self.blocks:
            x = self.run(x, layer)[0]
        return x.sin()

    def run(self, x: Tensor, layer: nn.Module) -> Any:
        match self.how:
            case "plain":
                return self.block(x, layer, scale=0.5)
            case "reentrant":
                return checkpoint(
                    functools.partial(self.block, scale=0.5), x, layer, use_reentrant=True
                )
            case "keywords":
                return checkpoint(self.block, x, layer=layer, scale=0.5, use_reentrant=False)
            case "by module":
                return checkpoints.checkpoint(self.block, x, layer, 0.5, use_reentrant=False)
            case "nested":
                inner = lambda x: checkpoint(self.block, x, layer, 0.5, use_reentrant=False)  # noqa: E731
                return checkpoint(inner, x, use_reentrant=False)
            case "captured":
                return checkpoint(lambda: self.block(x, layer, 0.5), use_reentrant=False)
        raise AssertionError(self.how)


def learn(linear: LinearizedModel, x: Tensor, steps: int = 2) -> list[Tensor]:
    """Outputs and gradients of a few steps of SGD, then the buffers."""
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        out = linear(x)
        out.square().sum().backward()
        results += [out.detach(), *(p.grad.clone() for p in linear.parameters())]  # type: ignore[union-attr]
        with torch.no_grad():
            for p in linear.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=0.1)
                p.grad = None
    return [*results, *(b.clone() for b in linear.buffers())]


@pytest.mark.parametrize("how", ["reentrant", "keywords", "by module", "nested", "captured"])
def test_gradients_are_those_without_checkpoints(how: str) -> None:
    backends._warn_of_checkpoints.cache_clear()
    torch.manual_seed(0)
    plain = Stack("plain").to(F64)
    other = Stack(how).to(F64)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(5, 6, dtype=F64)
    expected, actual = (learn(LinearizedModel(m).train(), x) for m in (plain, other))
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_sequence_in_segments() -> None:
    torch.manual_seed(0)
    model = Stack("sequential").to(F64)
    plain = nn.Sequential(nn.Tanh(), *model.blocks)
    x = torch.randn(5, 6, dtype=F64)
    grads = []
    for one in (model, plain):
        linear = LinearizedModel(one)
        linear(x).square().sum().backward()
        grads.append([p.grad for p in linear.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=False):
        torch.testing.assert_close(a, b)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that the graph of an output holds."""
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(sizes.values())


def test_the_graph_holds_the_inputs_of_segments_alone() -> None:
    x, sizes = torch.randn(64, 32), {}
    for how in ("plain", "keywords"):
        torch.manual_seed(0)
        linear = LinearizedModel(Stack(how, depth=8, width=32).train())
        linear(x)  # the first call is checked
        sizes[how] = saved_bytes(lambda linear=linear: linear(x))  # type: ignore[misc]
    weights = sum(p.nbytes for p in linear.parameters())
    assert sizes["keywords"] - weights < 0.45 * (sizes["plain"] - weights), sizes


def test_activations_that_are_no_arguments_are_kept_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backends._warn_of_checkpoints.cache_clear()
    linear = LinearizedModel(Stack("captured"))
    with caplog.at_level(logging.WARNING):
        linear(torch.randn(3, 6))
    assert "activations are kept" in caplog.text


class Context:
    """An activation that a segment finds in an object, or in the object that it is."""

    def __init__(self, layer: nn.Module, h: Tensor) -> None:
        self.layer, self.h = layer, h

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.h)


class Remembers(nn.Module):
    """A segment that uses an activation which is not among the tensors that it takes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.encoder, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.memory: Any = None

    def attribute(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.memory)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        context = Context(self.layer, h)
        segments: dict[str, tuple[Any, ...]] = {
            "object": (lambda c: c(x.detach()), types.SimpleNamespace(c=context).c),
            "objects": (lambda cs: cs["c"].call(x), {"c": types.SimpleNamespace(call=context)}),
            "callable": (context, x),
            "method": (context.__call__, x),
            "attribute": (self.attribute, x),
            "attribute of a module in a closure": (lambda z: self.attribute(z), x),
        }
        self.memory = h
        out: Tensor
        if self.how == "plain":
            out = context(x)
        else:
            out = checkpoint(*segments[self.how], use_reentrant=False)
        self.memory = None
        return out


@pytest.mark.parametrize(
    "how",
    ["object", "objects", "callable", "method", "attribute", "attribute of a module in a closure"],
)
def test_activations_within_reach_keep_their_gradients(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    backends._warn_of_checkpoints.cache_clear()
    grads, x = [], torch.randn(5, 4, dtype=F64)
    for one in ("plain", how):
        torch.manual_seed(0)
        linear = LinearizedModel(Remembers(one).to(F64))
        linear(x).sum().backward()
        grads.append([p.grad for p in linear.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    assert "activations are kept" in caplog.text


def test_a_segment_that_counts_its_calls_counts_each_once() -> None:
    class Counts(nn.Linear):
        calls: Tensor

        def block(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, x, use_reentrant=False)
            return out

    model = Counts(3, 3)
    model.register_buffer("calls", torch.zeros(()))
    linear = LinearizedModel(model).double()
    for expected in (1, 2):
        linear(torch.randn(5, 3, dtype=F64)).sum().backward()
        assert linear.get_buffer("calls") == expected


def test_without_gradients_nothing_is_run_twice() -> None:
    model, calls = Stack("keywords"), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    linear = LinearizedModel(model)
    with torch.no_grad():
        linear(torch.randn(3, 6))
        before = len(calls)
        linear(torch.randn(3, 6))
    assert len(calls) == before + 1


def test_autocast_is_that_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    grads = []
    for how in ("plain", "keywords"):
        torch.manual_seed(0)
        linear = LinearizedModel(Stack(how).eval())
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(torch.ones(5, 6))
        out.float().square().sum().backward()
        grads.append([p.grad for p in linear.parameters()])
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 0.02 * float(a.norm())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("library", ["open_clip", "timm", "transformers"])
def test_libraries(library: str) -> None:
    def build() -> tuple[nn.Module, Callable[[], Any], dict[str, Tensor]]:
        torch.manual_seed(0)
        if library == "timm":
            import timm

            vit: Any = timm.create_model("test_vit", num_classes=3)
            x = torch.randn(2, 3, 160, 160)
            return vit, lambda: vit.set_grad_checkpointing(True), {"x": x}
        if library == "open_clip":
            from open_clip.transformer import VisionTransformer

            tower = VisionTransformer(32, 16, 32, 3, 2, 4.0, output_dim=8)
            return (
                tower,
                lambda: tower.set_grad_checkpointing(True),
                {"x": torch.randn(2, 3, 32, 32)},
            )
        from transformers import T5Config, T5EncoderModel

        small = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        t5 = T5EncoderModel(small)
        return t5, t5.gradient_checkpointing_enable, {"input_ids": torch.arange(10)[None]}

    gradients = []
    for checkpointing in (False, True):
        model, enable, inputs = build()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            enable()
        linear = LinearizedModel(model).train()
        out = linear(*inputs.values()) if "x" in inputs else linear(**inputs)
        value = out if isinstance(out, Tensor) else out.last_hidden_state
        value.square().sum().backward()
        gradients.append({n: p.grad for n, p in linear.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and plain
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-4, atol=1e-4)
