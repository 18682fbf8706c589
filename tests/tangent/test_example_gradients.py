"""Gradients of single examples, of dense layers in their factors, against those of autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent_arithmetic.tangent.gradients import ExampleGradients
from tangent_arithmetic.tangent.layers import Outer
from tangent_arithmetic.training.factors import blocks_of

D = 24


class Odd(nn.Module):
    """Dense layers of which some are used as such, and others not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, 2 * D)
        self.bare = nn.Linear(2 * D, D, bias=False)
        self.twice = nn.Linear(D, D)
        self.scaled = nn.Linear(D, D)
        self.shared_bias = nn.Linear(D, D)
        self.small = nn.Linear(D, 2)
        self.idle = nn.Linear(D, D)
        self.attn = nn.MultiheadAttention(D, 4)
        self.cross = nn.MultiheadAttention(D, 4, kdim=2 * D, vdim=2 * D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = self.bare(h.tanh()) + self.cross(x, h, h, need_weights=False)[0]
        x = self.twice(self.twice(x).tanh())
        x = x + x @ (2 * self.scaled.weight) + self.scaled(x)
        x = x + self.shared_bias(x) * self.shared_bias.bias
        y = x.transpose(0, 1)  # tokens first
        y = y + self.attn(y, y, y)[0]
        features: Tensor = torch.cat([y.mean(0), self.small(y[0])], -1)
        return features


def vision_transformer() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 8, 32, 2, 2, 2.0, output_dim=8)


def timm_transformer() -> nn.Module:
    timm = pytest.importorskip("timm")
    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=0, embed_dim=24
    )
    return made


def odd() -> nn.Module:
    return Odd()


CASES: list[tuple[Any, tuple[int, ...], set[str]]] = [
    (odd, (3, D), {"first", "bare", "small", "attn.in_proj", "attn.out_proj", "cross.out_proj"}),
    (vision_transformer, (3, 16, 16), {"attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"}),
    (timm_transformer, (3, 16, 16), {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
]


@pytest.mark.parametrize(
    ("make", "shape", "covered"), CASES, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("probes", [1, 2])
def test_factored_gradients_are_those_of_autograd(
    make: Any, shape: tuple[int, ...], covered: set[str], probes: int
) -> None:
    torch.manual_seed(0)
    module = make().double().eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    weights = dict(module.named_parameters())
    names = [b.names for b in blocks_of(module) if len(b.shapes[0]) == 2]
    x = torch.randn(4, *shape).double()
    v = torch.randn(4, probes, module(x).shape[1]).double()
    of = ExampleGradients(module, weights, lambda f0, u: u / f0.norm(), names)
    found, multiplied = of.factored(x, v), of(x, v)
    assert of.can_batch and multiplied.keys() == weights.keys()
    factored = {name for name, value in found.items() if isinstance(value, Outer)}
    ends = {name.removesuffix("_weight").removesuffix(".weight") for name in factored}
    assert all(any(end.endswith(one) for one in covered) for end in ends)
    assert all(any(end.endswith(one) for end in ends) for one in covered)
    expected: dict[str, list[Tensor]] = {name: [] for name in weights}
    for image, vs in zip(x, v, strict=True):
        for u in vs:
            out = module(image[None])[0]
            cotangent = u / out.detach().norm()
            grads = torch.autograd.grad(
                out, list(weights.values()), cotangent, allow_unused=True, materialize_grads=True
            )
            for name, grad in zip(weights, grads, strict=True):
                expected[name].append(grad)
    for name, value in multiplied.items():
        torch.testing.assert_close(value, torch.stack(expected[name]), rtol=1e-9, atol=1e-11)
    for block in blocks_of(module):
        wanted = block.matrix({n: torch.stack(expected[n]) for n in block.names})
        own = found[block.name]
        if not isinstance(own, Outer):
            continue
        torch.testing.assert_close(own.dense(), wanted, rtol=1e-9, atol=1e-11)
        left, right = (torch.randn(side, 3).double() for side in own.sides)
        torch.testing.assert_close(own.project(left, right), left.mT @ wanted @ right)
        torch.testing.assert_close(own.times(right), wanted @ right)
        torch.testing.assert_close(own.mT.dense(), wanted.mT)
        torch.testing.assert_close(own.energy(), wanted.square().sum())


def test_examples_of_another_length_are_looked_at_anew() -> None:
    """Of a long one, the inputs of a layer may be larger than its weights."""
    torch.manual_seed(0)
    mean = nn.Sequential(nn.Linear(6, 5), nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten()).double()
    of = ExampleGradients(
        mean, dict(mean.named_parameters()), lambda _, u: u, [("0.weight", "0.bias")]
    )
    for tokens, kind in ((2, Outer), (9, Tensor), (2, Outer)):
        found = of.factored(torch.randn(3, tokens, 6).double(), torch.randn(3, 1, 5).double())
        assert isinstance(found["0.weight"], kind)
        assert of.bytes_of(torch.randn(1, tokens, 6).double()) == 8 * (22 if tokens == 2 else 35)


def test_a_module_that_cannot_be_mapped_is_taken_example_by_example() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.dense(x) if float(x.sum()) > 0 else 2 * self.dense(x)
            return found

    module = Branches().double()
    of = ExampleGradients(
        module, dict(module.named_parameters()), lambda _, u: u, [("dense.weight", "dense.bias")]
    )
    x = torch.cat([torch.ones(1, 20), -torch.ones(1, 20)]).double()
    found = of.factored(x, torch.ones(2, 1, 20).double())
    assert not of.can_batch and isinstance(found["dense.weight"], Tensor)
    torch.testing.assert_close(
        found["dense.bias"], torch.tensor([[1.0], [2.0]]).double().expand(2, 20)
    )


class Tied(nn.Module):
    """An autoencoder whose second layer is the first one's transposed weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(D, 2 * D), how

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight
        back = {
            "T": lambda: weight.T,
            "t": weight.t,
            "mT": lambda: weight.mT,
            "H": lambda: weight.H,
        }
        found: Tensor = nn.functional.linear(self.a(x).tanh(), back[self.how]())
        return found


class OfVectors(nn.Module):
    """A layer that is applied to a parameter, and one that is applied image by image."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(D, D), nn.Parameter(torch.randn(D))
        self.each = nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(self.q) @ self.p.weight.new_ones(D, 2 * D) + torch.stack(
            [self.each(one) for one in x]
        )


class ByMode(nn.Module):
    """A layer that is applied once more where gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return self.a(y) if torch.is_grad_enabled() else y


class Unseen(torch.autograd.Function):
    """A product with a weight that no functional shows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad


class Hidden(nn.Module):
    """A layer whose weight an `autograd.Function` uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Unseen.apply(self.a(x), self.a.weight)
        return found


class Mixed(nn.Module):
    """A layer of another precision than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        self.a.float()
        found: Tensor = self.b(self.a(x.float()).double())
        return found


@pytest.mark.parametrize(
    "make",
    [partial(Tied, "T"), partial(Tied, "t"), partial(Tied, "mT"), partial(Tied, "H"), OfVectors,
     ByMode, Hidden, Mixed],
    ids=["T", "t", "mT", "H", "vectors", "mode", "hidden", "mixed"],
)  # fmt: skip
def test_unusual_uses_of_a_weight_are_counted(make: Any) -> None:
    torch.manual_seed(0)
    module = make().double().eval()
    x = torch.randn(4, D).double()
    module(x)
    weights = dict(module.named_parameters())
    names = [b.names for b in blocks_of(module) if len(b.shapes[0]) == 2]
    v = torch.randn(4, 1, module(x).shape[1]).double()
    of = ExampleGradients(module, weights, lambda _, u: u, names)
    assert of.bytes_of(x[:1]) > 0
    found = of(x, v)
    for i in range(4):
        out = module(x[i : i + 1])[0]
        true = torch.autograd.grad(out, list(weights.values()), v[i, 0], allow_unused=True)
        for name, gradient in zip(weights, true, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-5, atol=1e-6)


def test_memory_is_that_of_whole_gradients_where_examples_are_taken_one_by_one() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(100, 100)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.dense(x) if float(x.sum()) > 0 else self.dense(2 * x)
            return found

    module = Branching()
    weights = dict(module.named_parameters())
    of = ExampleGradients(module, weights, lambda _, u: u, [("dense.weight", "dense.bias")])
    assert of.bytes_of(torch.ones(1, 100)) == 4 * 100 * 101
