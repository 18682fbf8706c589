"""Each rule agrees with PyTorch's own forward AD, and none is without a case."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent import checking, duals, jvp, jvps, plain_jvp
from tangent_arithmetic.tangent.rules import COMPOSITES, RULES, attention, recurrent

F64 = torch.float64
BAR = 1e-12
Function = Callable[..., Any]
Shape = tuple[int, ...]
Vectors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """The check of first calls would apply rules too, and each case has its own reference."""
    with checking(False):
        yield


class Applied(nn.Module):
    """A function of parameters alone: whatever can carry a tangent does."""

    def __init__(
        self, function: Function, shapes: Sequence[Shape], inner: nn.Module | None
    ) -> None:
        super().__init__()
        self.function, self.inner = function, inner
        self.inputs = nn.ParameterList([torch.empty(shape) for shape in shapes])

    def forward(self) -> Any:
        inputs = list(self.inputs)
        return self.function(*inputs) if self.inner is None else self.function(self.inner, *inputs)


@dataclass
class Case:
    """A functional in one of its branches.

    Attributes:
        functional: the key of the rule.
        function: applies it to parameters of these shapes, after the inner module if any.
        inner: makes a module that applies it.
        reference: what PyTorch differentiates in its place, where it is wrong or refuses.
        falls_back: whether the rule leaves the case to PyTorch.
        chunk: how many probabilities of attention are held at once.
        warning: a pattern of the warnings that PyTorch gives.
    """

    functional: Function
    function: Function
    shapes: tuple[Shape, ...]
    inner: Callable[[], nn.Module] | None = None
    reference: Function | None = None
    falls_back: bool = False
    chunk: int | None = None
    warning: str | None = None

    def model(self, function: Function | None = None) -> nn.Module:
        """The case, or another function of its parameters, at repeatable weights."""
        inner = None if self.inner is None else self.inner()
        made = Applied(function or self.function, self.shapes, inner)
        made = made.to(F64).eval().requires_grad_(False)
        for value, new in zip(made.parameters(), self.randoms(made, 0).values(), strict=True):
            value.copy_(new)
        return made

    @staticmethod
    def randoms(model: nn.Module, seed: int) -> Vectors:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(value.shape, generator=generator, dtype=F64)
            for name, value in model.named_parameters()
        }

    @contextmanager
    def setting(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            if self.chunk is not None:
                patch.setattr(attention, "CHUNK", self.chunk)
            if self.warning is not None:
                warnings.filterwarnings("ignore", message=self.warning)
            yield


CASES: dict[str, Case] = {}


def case(name: str, functional: Function, function: Function, *shapes: Shape, **more: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(functional, function, shapes, **more)


def constant(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64)


# --- linear layers

case("linear 1-D", F.linear, F.linear, (3,), (4, 3), (4,))
case("linear 2-D", F.linear, F.linear, (5, 3), (4, 3), (4,))
case("linear 3-D", F.linear, F.linear, (2, 5, 3), (4, 3), (4,))
case("linear 4-D", F.linear, F.linear, (2, 2, 5, 3), (4, 3), (4,))
case("linear of one row", F.linear, F.linear, (1, 3), (4, 3), (4,))
case("linear of no row", F.linear, F.linear, (0, 3), (4, 3), (4,))
case("linear of no feature", F.linear, F.linear, (5, 0), (4, 0), (4,))
case("linear 1-D without bias", F.linear, F.linear, (3,), (4, 3))
case("linear 2-D without bias", F.linear, F.linear, (5, 3), (4, 3))
case("linear 3-D without bias", F.linear, F.linear, (2, 5, 3), (4, 3))
case("linear to one number", F.linear, F.linear, (5, 3), (3,), falls_back=True)
case("linear of a transpose", F.linear, lambda x, *w: F.linear(x.mT, *w), (2, 3, 5), (4, 3), (4,))
case("linear of a slice", F.linear, lambda x, *w: F.linear(x[..., ::2], *w), (2, 6), (4, 3), (4,))
case("linear of rows alike", F.linear, lambda x, *w: F.linear(x.expand(5, 3), *w), (3,), (4, 3))
case("linear by a transpose", F.linear, lambda x, w, b: F.linear(x, w.mT, b), (5, 3), (3, 4), (4,))
case(
    "linear by keywords",
    F.linear,
    lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    *((5, 3), (4, 3), (4,)),
)
case("linear of its own weight", F.linear, lambda w: F.linear(w, w), (3, 3))

# --- matrix products

case("@ of matrices", Tensor.matmul, lambda a, b: a @ b, (4, 3), (3, 2))
case("@ of batches", Tensor.matmul, lambda a, b: a @ b, (2, 4, 3), (2, 3, 2))
case("@ with broadcasting", Tensor.matmul, lambda a, b: a @ b, (2, 1, 4, 3), (5, 3, 2))
case("@ of a batch and a matrix", Tensor.matmul, lambda a, b: a @ b, (2, 4, 3), (3, 2))
case("@ of a transpose with itself", Tensor.matmul, lambda a: a.mT @ a, (2, 4, 3))
case("Tensor.matmul by keyword", Tensor.matmul, lambda a, b: a.matmul(other=b), (4, 3), (3, 2))
case("torch.matmul of matrices", torch.matmul, torch.matmul, (4, 3), (3, 2))
case("torch.matmul of vectors", torch.matmul, torch.matmul, (3,), (3,))
case("torch.matmul of a vector and a matrix", torch.matmul, torch.matmul, (3,), (3, 2))
case("torch.matmul of a matrix and a vector", torch.matmul, torch.matmul, (4, 3), (3,))
case("torch.matmul of a vector and a batch", torch.matmul, torch.matmul, (3,), (2, 3, 4))
case("torch.matmul of a batch and a vector", torch.matmul, torch.matmul, (2, 4, 3), (3,))
case("torch.matmul of no row", torch.matmul, torch.matmul, (0, 3), (3, 2))
case("torch.addmm", torch.addmm, torch.addmm, (2,), (4, 3), (3, 2))
case("torch.addmm of a matrix", torch.addmm, torch.addmm, (4, 2), (4, 3), (3, 2), falls_back=True)
case("Tensor.addmm", Tensor.addmm, lambda b, x, w: b.addmm(x, w), (2,), (4, 3), (3, 2))
case("torch.mm", torch.mm, torch.mm, (4, 3), (3, 2))
case(
    "torch.mm by keyword",
    torch.mm,
    lambda a, b: torch.mm(a, mat2=b),
    (4, 3),
    (3, 2),
    falls_back=True,
)
case("Tensor.mm", Tensor.mm, lambda a, b: a.mm(b), (4, 3), (3, 2))
case("torch.bmm", torch.bmm, torch.bmm, (2, 4, 3), (2, 3, 2))
case(
    "torch.bmm by keyword",
    torch.bmm,
    lambda a, b: torch.bmm(a, mat2=b),
    (2, 4, 3),
    (2, 3, 2),
    falls_back=True,
)
case("Tensor.bmm", Tensor.bmm, lambda a, b: a.bmm(b), (2, 4, 3), (2, 3, 2))
case("Tensor.bmm of transposes", Tensor.bmm, lambda a, b: a.mT.bmm(b.mT), (2, 3, 4), (2, 2, 3))

# --- convolutions: shapes of input, weight and bias, and options

CONVOLUTIONS: list[tuple[str, Function, tuple[Shape, ...], dict[str, Any]]] = [
    ("conv1d", F.conv1d, ((2, 3, 8), (4, 3, 3), (4,)), {}),
    ("conv1d of one sequence", F.conv1d, ((3, 8), (4, 3, 3), (4,)), {}),
    ("conv1d without bias", F.conv1d, ((2, 3, 8), (4, 3, 3)), {}),
    ("conv1d stride", F.conv1d, ((2, 3, 8), (4, 3, 3), (4,)), {"stride": 2, "padding": 1}),
    ("conv1d same", F.conv1d, ((2, 3, 8), (4, 3, 3), (4,)), {"padding": "same"}),
    ("conv1d dilation", F.conv1d, ((2, 3, 8), (4, 3, 3), (4,)), {"dilation": 2}),
    ("conv1d groups", F.conv1d, ((2, 4, 8), (6, 2, 3), (6,)), {"groups": 2}),
    ("conv2d", F.conv2d, ((2, 3, 6, 5), (4, 3, 3, 2), (4,)), {}),
    ("conv2d of one image", F.conv2d, ((3, 6, 5), (4, 3, 3, 2), (4,)), {}),
    ("conv2d of no image", F.conv2d, ((0, 3, 6, 5), (4, 3, 3, 2), (4,)), {}),
    ("conv2d without bias", F.conv2d, ((2, 3, 6, 5), (4, 3, 3, 2)), {}),
    ("conv2d stride", F.conv2d, ((2, 3, 6, 5), (4, 3, 3, 2), (4,)), {"stride": (2, 1)}),
    ("conv2d padding", F.conv2d, ((2, 3, 6, 5), (4, 3, 3, 2), (4,)), {"padding": (0, 2)}),
    ("conv2d same", F.conv2d, ((2, 3, 6, 5), (4, 3, 3, 3), (4,)), {"padding": "same"}),
    ("conv2d valid", F.conv2d, ((2, 3, 6, 5), (4, 3, 3, 3), (4,)), {"padding": "valid"}),
    ("conv2d dilation", F.conv2d, ((2, 3, 6, 5), (4, 3, 2, 2), (4,)), {"dilation": (3, 2)}),
    ("conv2d groups", F.conv2d, ((2, 4, 6, 5), (6, 2, 3, 2), (6,)), {"groups": 2}),
    ("conv2d depthwise", F.conv2d, ((2, 4, 6, 5), (4, 1, 3, 3)), {"groups": 4, "padding": 1}),
    ("conv2d patches", F.conv2d, ((2, 3, 4, 4), (5, 3, 2, 2), (5,)), {"stride": 2}),
    ("conv3d", F.conv3d, ((2, 2, 4, 5, 3), (3, 2, 2, 3, 2), (3,)), {}),
    ("conv3d without bias", F.conv3d, ((2, 2, 4, 5, 3), (3, 2, 2, 3, 2)), {}),
    (
        "conv3d with options",
        F.conv3d,
        ((2, 4, 4, 5, 3), (2, 2, 2, 2, 2), (2,)),
        {"stride": (1, 2, 1), "padding": 1, "dilation": (1, 2, 1), "groups": 2},
    ),
    ("conv_transpose1d", F.conv_transpose1d, ((2, 3, 5), (3, 4, 3), (4,)), {}),
    ("conv_transpose1d without bias", F.conv_transpose1d, ((2, 3, 5), (3, 4, 3)), {}),
    ("conv_transpose1d stride", F.conv_transpose1d, ((3, 5), (3, 4, 3), (4,)), {"stride": 2}),
    ("conv_transpose2d", F.conv_transpose2d, ((2, 3, 3, 4), (3, 4, 2, 3), (4,)), {}),
    (
        "conv_transpose2d with options",
        F.conv_transpose2d,
        ((2, 4, 3, 4), (4, 2, 3, 3), (4,)),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2},
    ),
    ("conv_transpose3d", F.conv_transpose3d, ((2, 2, 3, 2, 3), (2, 3, 2, 2, 2), (3,)), {}),
    (
        "conv_transpose3d with options",
        F.conv_transpose3d,
        ((2, 2, 3, 2, 3), (2, 3, 2, 2, 2)),
        {"stride": (1, 2, 1), "padding": (1, 0, 0)},
    ),
]


def with_options(function: Function, options: dict[str, Any]) -> Function:
    return lambda *tensors: function(*tensors, **options)


for _name, _function, _shapes, _options in CONVOLUTIONS:
    case(_name, _function, with_options(_function, _options), *_shapes)
case(
    "conv2d by position",
    F.conv2d,
    lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 1),
    *((2, 3, 6, 5), (4, 3, 3, 2), (4,)),
)
case(
    "conv2d by keywords",
    F.conv2d,
    lambda x, w, b: F.conv2d(bias=b, weight=w, input=x),
    *((2, 3, 6, 5), (4, 3, 3, 2), (4,)),
)
case(
    "nn.Conv2d with circular padding",
    F.conv2d,
    lambda conv, x: conv(x),
    (2, 3, 4, 4),
    inner=lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
)
case(
    "conv2d channels last",
    F.conv2d,
    lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w),
    *((2, 3, 4, 4), (4, 3, 2, 2)),
)

# --- embeddings

IDS = torch.tensor([[0, 2, 2], [1, 4, 3]])


def embedding(**options: Any) -> Function:
    return lambda table: F.embedding(IDS, table, **options)


case("embedding", F.embedding, embedding(), (5, 3))
case("embedding padding", F.embedding, embedding(padding_idx=2), (5, 3))
case("embedding padding from the end", F.embedding, embedding(padding_idx=-1), (5, 3))
case("embedding by count", F.embedding, embedding(scale_grad_by_freq=True), (5, 3), falls_back=True)
BAGS = torch.tensor([[0, 1, 4], [2, 2, 3]])
case(
    "embedding_bag",
    F.embedding_bag,
    lambda table, weights: F.embedding_bag(BAGS, table, mode="sum", per_sample_weights=weights),
    (5, 3),
    (2, 3),
    reference=lambda table, weights: (F.embedding(BAGS, table) * weights[..., None]).sum(1),
)
for _mode in ("mean", "max"):
    case(
        f"embedding_bag of rows, {_mode}",
        F.embedding_bag,
        lambda table, mode=_mode: F.embedding_bag(
            BAGS.flatten(), table, torch.tensor([0, 3]), mode=mode
        ),
        (5, 3),
        reference=lambda table, mode=_mode: (
            F.embedding(BAGS, table).mean(1) if mode == "mean" else F.embedding(BAGS, table).amax(1)
        ),
    )
for _mode, _name in (
    ("sum", "sum"), ("mean", "mean"), ("max", "amax"), ("min", "amin"), ("prod", "prod")
):  # fmt: skip
    case(
        f"segment_reduce {_mode}",
        torch.segment_reduce,
        lambda rows, mode=_mode: torch.segment_reduce(rows, mode, lengths=torch.tensor([2, 3])),
        (5, 3),
        reference=lambda rows, name=_name: torch.stack(
            [getattr(part, name)(0) for part in (rows[:2], rows[2:])]
        ),
    )
COLUMNS = torch.tensor([[0, 1, 1, 2, 1], [2, 2, 0, 1, 2]])


def products(x: Tensor, y: Tensor) -> Tensor:
    """x times the products of the entries of y in each column of x."""
    return x * torch.stack([torch.where(COLUMNS.eq(j), y, 1.0).prod(1) for j in range(3)], 1)


case(
    "scatter_reduce prod",
    torch.scatter_reduce,
    lambda x, y: torch.scatter_reduce(x, 1, COLUMNS, y, "prod"),
    (2, 3),
    (2, 5),
    reference=products,
    falls_back=True,
)
case(
    "scatter_reduce_ prod",
    Tensor.scatter_reduce_,
    lambda x, y: x.clone().scatter_reduce_(1, COLUMNS, y, "prod"),
    (2, 3),
    (2, 5),
    reference=products,
)
SPARSE = torch.eye(4, dtype=F64).roll(1, 0)[:, :4].to_sparse()
case(
    "sparse.mm",
    torch.sparse.mm,
    lambda x: torch.sparse.mm(SPARSE, x),
    (4, 3),
    reference=lambda x: SPARSE.to_dense() @ x,
)
case(
    "spmm",
    torch.spmm,
    lambda x: torch.spmm(SPARSE, x),
    (4, 3),
    reference=lambda x: SPARSE.to_dense() @ x,
)
case("embedding sparse", F.embedding, embedding(sparse=True), (5, 3))
case(
    "nn.Embedding",
    F.embedding,
    lambda table: table(IDS),
    inner=lambda: nn.Embedding(5, 3, padding_idx=1),
)

# --- pooling and means

case("avg_pool1d", F.avg_pool1d, lambda x: F.avg_pool1d(x, 2), (2, 3, 7))
case(
    "avg_pool1d with options",
    F.avg_pool1d,
    lambda x: F.avg_pool1d(x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    (2, 3, 8),
)
case("avg_pool2d", F.avg_pool2d, lambda x: F.avg_pool2d(x, 2), (2, 3, 5, 4))
case(
    "avg_pool2d with options",
    F.avg_pool2d,
    lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), True, False, divisor_override=5),
    (2, 3, 6, 5),
)
case("avg_pool3d", F.avg_pool3d, lambda x: F.avg_pool3d(x, 2, stride=1), (2, 3, 4, 3, 4))
case("adaptive_avg_pool1d", F.adaptive_avg_pool1d, lambda x: F.adaptive_avg_pool1d(x, 3), (2, 3, 7))
case(
    "adaptive_avg_pool2d to one",
    F.adaptive_avg_pool2d,
    lambda x: F.adaptive_avg_pool2d(x, 1),
    (2, 3, 5, 4),
)
case(
    "adaptive_avg_pool2d to a size",
    F.adaptive_avg_pool2d,
    lambda x: F.adaptive_avg_pool2d(x, (3, None)),
    (2, 3, 5, 4),
)
case(
    "adaptive_avg_pool3d",
    F.adaptive_avg_pool3d,
    lambda x: F.adaptive_avg_pool3d(x, (2, 1, 3)),
    (2, 3, 5, 4, 3),
)
case("torch.mean", torch.mean, torch.mean, (2, 3, 4))
case("torch.mean of a number", torch.mean, torch.mean, ())
case("torch.mean of a dimension", torch.mean, lambda x: torch.mean(x, 1), (2, 3, 4))
case("torch.mean by keyword", torch.mean, lambda x: torch.mean(input=x, dim=1), (2, 3, 4))
case("torch.mean keepdim", torch.mean, lambda x: torch.mean(x, (0, -1), keepdim=True), (2, 3, 4))
case("torch.mean dtype", torch.mean, lambda x: torch.mean(x.float(), 1, dtype=F64), (2, 3, 4))
case("Tensor.mean", Tensor.mean, lambda x: x.mean(), (2, 3, 4))
case("Tensor.mean of dimensions", Tensor.mean, lambda x: x.mean((-2, -1)), (2, 3, 4))
case("Tensor.mean of an axis", Tensor.mean, lambda x: x.mean(axis=1, keepdims=True), (2, 3, 4))

# --- normalisation

case("hardsigmoid", F.hardsigmoid, lambda x: F.hardsigmoid(3 * x), (4, 5))
for _function in (F.silu, F.mish, F.hardswish, F.relu6, F.elu, F.leaky_relu):
    _name = f"activation {_function.__name__}"
    case(_name, _function, lambda x, f=_function: f(3 * x), (4, 5))
    case(
        f"{_name} in place",
        _function,
        lambda x, f=_function: f(3 * x, inplace=True),
        (4, 5),
        reference=lambda x, f=_function: f(3 * x),
    )
case("leaky_relu of a slope", F.leaky_relu, lambda x: F.leaky_relu(x, 0.3), (4, 5))
case("elu of a scale", F.elu, lambda x: F.elu(x, alpha=0.3), (4, 5))
case("torch.div", torch.div, lambda x, y: torch.div(x, y * y + 1), (4, 5), (5,))
case("torch.div by a number", torch.div, lambda x: torch.div(x, 3), (4, 5))
case(
    "torch.div of a constant", torch.div, lambda x: torch.div(torch.ones(4, 1, dtype=F64), x), (5,)
)
case(
    "torch.div floored",
    torch.div,
    lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    (4,),
    falls_back=True,
)
case("torch.true_divide", torch.true_divide, lambda x, y: torch.true_divide(x, y), (4, 5), (5,))
case("Tensor.div", Tensor.div, lambda x, y: x.div(y), (4, 1), (5,))
case("Tensor.true_divide", Tensor.true_divide, lambda x, y: x.true_divide(y), (4, 1), (5,))
case("/", Tensor.div, lambda x, y: x / y, (4, 1), (5,))
case("torch.pow", torch.pow, lambda x: torch.pow(x, 3), (4, 5))
case("torch.pow of 0", torch.pow, lambda x: torch.pow(x, 0) * x, (4, 5), falls_back=True)
case("Tensor.pow", Tensor.pow, lambda x: x.pow(2), (4, 5))
case("**", Tensor.__pow__, lambda x: (x * x + 1) ** -0.5, (4, 5))
for _function in (torch.square, torch.exp, torch.sqrt, torch.rsqrt):
    _method = getattr(Tensor, _function.__name__)
    case(f"torch.{_function.__name__}", _function, lambda x, f=_function: f(x * x + 1), (4, 5))
    case(f"Tensor.{_function.__name__}", _method, lambda x, f=_method: f(x * x + 1), (4, 5))
case(
    "einsum", torch.einsum, lambda *x: torch.einsum("bi,bj,ijk->bk", *x), (2, 3), (2, 4), (3, 4, 5)
)
case("einsum of itself", torch.einsum, lambda x: torch.einsum("bi,bi->b", x, x), (2, 3))
case("layer_norm", F.layer_norm, lambda x, w, b: F.layer_norm(x, (4,), w, b), (2, 3, 4), (4,), (4,))
case(
    "layer_norm of one row", F.layer_norm, lambda x, *p: F.layer_norm(x, (4,), *p), (4,), (4,), (4,)
)
case("layer_norm of no row", F.layer_norm, lambda x, *p: F.layer_norm(x, (4,), *p), (0, 4), (4,))
case("layer_norm without affine map", F.layer_norm, lambda x: F.layer_norm(x, (4,)), (2, 3, 4))
case("layer_norm without bias", F.layer_norm, lambda x, w: F.layer_norm(x, (4,), w), (3, 4), (4,))
case(
    "layer_norm without weight",
    F.layer_norm,
    lambda x, b: F.layer_norm(x, (4,), None, b),
    *((3, 4), (4,)),
)
case(
    "layer_norm of several dimensions",
    F.layer_norm,
    lambda x, w, b: F.layer_norm(x, (3, 4), w, b, eps=0.1),
    *((2, 3, 4), (3, 4), (3, 4)),
)
case(
    "layer_norm by keywords",
    F.layer_norm,
    lambda x, w, b: F.layer_norm(bias=b, weight=w, input=x, normalized_shape=[4]),
    *((2, 3, 4), (4,), (4,)),
)
case(
    "layer_norm of a transpose",
    F.layer_norm,
    lambda x, w, b: F.layer_norm(x.mT, (4,), w, b),
    *((2, 4, 3), (4,), (4,)),
)
case(
    "torch.layer_norm",
    torch.layer_norm,
    lambda x, w, b: torch.layer_norm(x, (4,), w, b),
    *((2, 3, 4), (4,), (4,)),
)
case(
    "nn.LayerNorm",
    F.layer_norm,
    lambda f, x: f(x),
    (2, 4),
    inner=lambda: nn.LayerNorm(4, bias=False),
)

case("group_norm", F.group_norm, lambda x, *p: F.group_norm(x, 2, *p), (2, 4, 3, 3), (4,), (4,))
case("group_norm 3-D", F.group_norm, lambda x, *p: F.group_norm(x, 2, *p), (2, 4, 3), (4,), (4,))
case("group_norm 2-D", F.group_norm, lambda x, *p: F.group_norm(x, 2, *p), (3, 4), (4,), (4,))
case(
    "group_norm of no examples",
    F.group_norm,
    lambda x, *p: F.group_norm(x, 2, *p),
    (0, 4, 3, 3),
    (4,),
    (4,),
)
case("group_norm of one group", F.group_norm, lambda x, *p: F.group_norm(x, 1, *p), (2, 4, 3), (4,))
case("group_norm of channels", F.group_norm, lambda x, *p: F.group_norm(x, 4, *p), (2, 4, 3), (4,))
case("group_norm without affine map", F.group_norm, lambda x: F.group_norm(x, 2), (2, 4, 3, 3))
case(
    "group_norm without weight",
    F.group_norm,
    lambda x, b: F.group_norm(x, 2, None, b, eps=0.1),
    *((2, 4, 3), (4,)),
)
case(
    "group_norm channels last",
    F.group_norm,
    lambda x, *p: F.group_norm(x.to(memory_format=torch.channels_last), 2, *p),
    *((2, 4, 3, 3), (4,), (4,)),
)
case(
    "torch.group_norm",
    torch.group_norm,
    lambda x, w, b: torch.group_norm(x, 2, w, b),
    *((2, 4, 3), (4,), (4,)),
)
case("nn.GroupNorm", F.group_norm, lambda f, x: f(x), (2, 4, 3), inner=lambda: nn.GroupNorm(2, 4))

MEAN, VAR = constant(3), constant(3).square() + 0.5


def batch_norm(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.batch_norm(x, MEAN, VAR, w, b)


def batch_norm_of_the_batch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


def batch_norm_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred * torch.rsqrt(centred.square().mean(0) + 1e-5) * w + b


for _shape in ((5, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 2, 2)):
    case(f"batch_norm {len(_shape)}-D", F.batch_norm, batch_norm, _shape, (3,), (3,))
case("batch_norm of one row", F.batch_norm, batch_norm, (1, 3), (3,), (3,))
case("batch_norm without affine map", F.batch_norm, batch_norm, (2, 3, 4))
case("batch_norm without bias", F.batch_norm, batch_norm, (2, 3, 4), (3,))
case(
    "batch_norm without weight",
    F.batch_norm,
    lambda x, b: F.batch_norm(x, MEAN, VAR, None, b, eps=0.1),
    *((2, 3, 4), (3,)),
)
case(
    "batch_norm of the batch",
    F.batch_norm,
    batch_norm_of_the_batch,
    *((5, 3), (3,), (3,)),
    reference=batch_norm_by_hand,
    falls_back=True,
)
case(
    "batch_norm in train mode",
    F.batch_norm,
    lambda x, w, b: F.batch_norm(x, MEAN.clone(), VAR.clone(), w, b, training=True),
    *((5, 3), (3,), (3,)),
    reference=batch_norm_by_hand,
    falls_back=True,
)

for _dim, _norms in {-1: (1,), 0: (4, 1, 1), 1: (1, 3, 1), 2: (1, 1, 2)}.items():
    _function = with_options(torch._weight_norm, {"dim": _dim})
    case(f"weight_norm along {_dim}", torch._weight_norm, _function, (4, 3, 2), _norms)
case(
    "weight_norm of nn.Linear",
    torch._weight_norm,
    lambda layer, x: layer(x),
    (5, 3),
    inner=lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
)
case(
    "weight_norm of nn.Conv2d, whole",
    torch._weight_norm,
    lambda layer, x: layer(x),
    (2, 3, 4, 4),
    inner=lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 2), dim=-1),
)

# --- elementwise functionals

case("gelu", F.gelu, F.gelu, (3, 4))
case("gelu by tanh", F.gelu, lambda x: F.gelu(x, approximate="tanh"), (3, 4))
case("gelu of a transpose", F.gelu, lambda x: F.gelu(x.mT), (3, 4))
case("gelu of rows alike", F.gelu, lambda x: F.gelu(x.expand(3, 4)), (4,))
case("silu", F.silu, F.silu, (3, 4))


def relu_of_a_view(x: Tensor) -> Tensor:
    y = x + 0
    y[:, 1:3].relu_()
    return y * y


def relu_then_its_input(x: Tensor) -> Tensor:
    y = x + 0
    return F.relu(y, inplace=True) + 0.1 * y


case("F.relu", F.relu, F.relu, (3, 4))
case("F.relu in place", F.relu, lambda x: F.relu(x + 0, inplace=True), (3, 4))
case("F.relu in place, then its input", F.relu, relu_then_its_input, (3, 4))
case("torch.relu", torch.relu, torch.relu, (3, 4))
case("Tensor.relu", Tensor.relu, lambda x: x.relu(), (3, 4))
case("torch.relu_", torch.relu_, lambda x: torch.relu_(x + 0), (3, 4))
case("Tensor.relu_", Tensor.relu_, lambda x: (x + 0).relu_(), (3, 4))
case("Tensor.relu_ of a view", Tensor.relu_, relu_of_a_view, (3, 4))
case("Tensor.relu_ of a transpose", Tensor.relu_, lambda x: (x + 0).mT.relu_(), (3, 4))
case("nn.ReLU in place", F.relu, lambda f, x: f(x + 0), (3, 4), inner=lambda: nn.ReLU(inplace=True))
case("torch.sigmoid", torch.sigmoid, torch.sigmoid, (3, 4))
case("Tensor.sigmoid", Tensor.sigmoid, lambda x: x.sigmoid(), (3, 4))
case("F.sigmoid", Tensor.sigmoid, F.sigmoid, (3, 4))
case("torch.tanh", torch.tanh, torch.tanh, (3, 4))
case("Tensor.tanh", Tensor.tanh, lambda x: x.tanh(), (3, 4))
case("F.tanh", Tensor.tanh, F.tanh, (3, 4))

case("torch.softmax", torch.softmax, lambda x: torch.softmax(x, 1), (2, 3, 4))
case("torch.softmax by keyword", torch.softmax, lambda x: torch.softmax(input=x, dim=-1), (3, 4))
case(
    "torch.softmax dtype", torch.softmax, lambda x: torch.softmax(x.float(), -1, dtype=F64), (3, 4)
)
case(
    "torch.softmax of an axis",
    torch.softmax,
    with_options(torch.softmax, {"axis": 1}),
    (2, 3, 4),
    falls_back=True,
)
case("Tensor.softmax", Tensor.softmax, lambda x: x.softmax(0), (2, 3, 4))
case("Tensor.softmax dtype", Tensor.softmax, lambda x: x.float().softmax(dim=-1, dtype=F64), (3, 4))
case(
    "Tensor.softmax of an axis",
    Tensor.softmax,
    with_options(Tensor.softmax, {"axis": 1}),
    (2, 3, 4),
    falls_back=True,
)
case("F.softmax", F.softmax, lambda x: F.softmax(x, dim=1), (2, 3, 4))
case("F.softmax dtype", F.softmax, lambda x: F.softmax(x.float(), -1, dtype=F64), (3, 4))
case(
    "F.softmax of a guessed dimension",
    F.softmax,
    F.softmax,
    (3, 4),
    falls_back=True,
    warning="Implicit dimension choice for softmax",
)

WHOLE = torch.tensor([3, -1, 2, 0])

case("* of two", Tensor.mul, lambda a, b: a * b, (3, 4), (3, 4))
case("* of itself", Tensor.mul, lambda a: a * a, (3, 4))
case("* with broadcasting to the left", Tensor.mul, lambda a, b: a * b, (4,), (2, 3, 4))
case("* with broadcasting to the right", Tensor.mul, lambda a, b: a * b, (2, 3, 4), (3, 1))
case("* with broadcasting of both", Tensor.mul, lambda a, b: a * b, (3, 1), (2, 1, 4))
case("* of a scalar tensor", Tensor.mul, lambda a, b: a * b, (), (3, 4))
case("* by a number", Tensor.mul, lambda a: a * 2.5, (3, 4))
case("a number *", Tensor.mul, lambda a: 3 * a, (3, 4))
case("* by whole numbers", Tensor.mul, lambda a: a * WHOLE, (3, 4))
case("whole numbers *", Tensor.mul, lambda a: WHOLE * a, (3, 4))
case("* by truth values", Tensor.mul, lambda a: a * (WHOLE > 0), (3, 1))
case("* of two precisions", Tensor.mul, lambda a, b: a * b.float(), (3, 4), (3, 4))
case("Tensor.mul", Tensor.mul, lambda a, b: a.mul(b), (3, 4), (4,))
case("Tensor.mul by keyword", Tensor.mul, lambda a, b: a.mul(other=b), (3, 4), (4,))
case("Tensor.multiply", Tensor.multiply, lambda a, b: a.multiply(b), (3, 4), (4,))
case("torch.mul", torch.mul, torch.mul, (3, 4), (4,))
case("torch.mul by a number", torch.mul, lambda a: torch.mul(a, -2), (3, 4))
case("torch.multiply", torch.multiply, torch.multiply, (3, 4), (4,))


def _quick_gelu() -> nn.Module:
    from open_clip.transformer import QuickGELU

    made: nn.Module = QuickGELU()
    return made


case("QuickGELU of open_clip: sigmoid", torch.sigmoid, lambda f, x: f(x), (3, 4), inner=_quick_gelu)
case("QuickGELU of open_clip: *", Tensor.mul, lambda f, x: f(x), (3, 4), inner=_quick_gelu)

# --- attention

sdpa = F.scaled_dot_product_attention
SINCE_2_5 = "enable_gqa" in (sdpa.__doc__ or "")  # of PyTorch; a row without keys was NaN before
B, H, L, S, E = 2, 3, 4, 5, 6
Q, K = (B, H, L, E), (B, H, S, E)
LOWER = torch.ones(L, S, dtype=torch.bool).tril(1)
EMPTY_ROW = LOWER.clone().index_fill_(0, torch.tensor([1]), False)
NUMBERS = constant(H, L, S)


def attend(mask: Tensor | None = None, **options: Any) -> Function:
    return lambda q, k, v: sdpa(q, k, v, mask, **options)


def attend_by_hand(mask: Tensor) -> Function:
    """Attention whose rows without any key are zero, which PyTorch's forward AD makes NaN."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / math.sqrt(E)).masked_fill(~mask, -1e30)
        return scores.softmax(-1) * mask.any(-1, keepdim=True) @ v

    return attention


case("sdpa", sdpa, sdpa, Q, K, K)
case("sdpa 5-D", sdpa, sdpa, (2, *Q), (2, *K), (2, *K))
case("sdpa 3-D", sdpa, sdpa, Q[1:], K[1:], K[1:])
case("sdpa 2-D", sdpa, sdpa, Q[2:], K[2:], K[2:])
case("sdpa of no row", sdpa, sdpa, (0, H, L, E), (0, H, S, E), (0, H, S, E))
case("sdpa of one query", sdpa, sdpa, (B, H, 1, E), K, K)
case("sdpa of itself", sdpa, lambda x: sdpa(x, x, x), Q)
case("sdpa of transposes", sdpa, lambda *x: sdpa(*(y.transpose(1, 2) for y in x)), Q, Q, Q)
case("sdpa of values of other width", sdpa, sdpa, Q, K, (B, H, S, 2))
case("sdpa with few heads of keys", sdpa, sdpa, Q, (B, 1, S, E), (B, 1, S, E))
case("sdpa with one batch of keys", sdpa, sdpa, Q, (1, H, S, E), (1, H, S, E))
case("sdpa with keys without batch", sdpa, sdpa, Q, (H, S, E), (S, E))
case("sdpa with queries without batch", sdpa, sdpa, (L, E), K, K)
case("sdpa scale", sdpa, attend(scale=0.3), Q, K, K)
case("sdpa causal", sdpa, attend(is_causal=True), Q, Q, Q)
case("sdpa causal, more keys", sdpa, attend(is_causal=True), Q, K, K)
case("sdpa causal, more queries", sdpa, attend(is_causal=True), K, Q, Q)
case("sdpa causal 2-D", sdpa, attend(is_causal=True), Q[2:], Q[2:], Q[2:])
case("sdpa bool mask", sdpa, attend(LOWER), Q, K, K)
case("sdpa bool mask a batch", sdpa, attend(constant(B, 1, L, S) > -1), Q, K, K)
case("sdpa bool mask of keys", sdpa, attend(constant(B, 1, 1, S) > -0.5), Q, K, K)
case("sdpa bool mask 3-D", sdpa, attend(LOWER), Q[1:], K[1:], K[1:])
case("sdpa float mask", sdpa, attend(NUMBERS), Q, K, K)
case("sdpa float mask 2-D", sdpa, attend(NUMBERS[0]), Q[2:], K[2:], K[2:])
case("sdpa float mask, scale", sdpa, attend(NUMBERS, scale=2.0), Q, K, K)
case(
    "sdpa float mask with infinities", sdpa, attend(NUMBERS.masked_fill(~LOWER, -math.inf)), Q, K, K
)
case("sdpa mask of a number a query", sdpa, attend(constant(L, 1)), Q, K, K)
case("sdpa learnt mask", sdpa, sdpa, Q, K, K, (B, H, L, S))
case("sdpa learnt mask of heads", sdpa, sdpa, Q, K, K, (H, L, S))
case("sdpa learnt mask of all", sdpa, sdpa, Q, K, K, (L, S))
case("sdpa learnt mask of keys", sdpa, sdpa, Q, K, K, (B, 1, 1, S))
case("sdpa learnt mask of queries", sdpa, sdpa, Q, K, K, (L, 1))
case("sdpa learnt mask 2-D", sdpa, sdpa, Q[2:], K[2:], K[2:], (L, S))
case(
    "sdpa by keywords",
    sdpa,
    lambda q, k, v, m: sdpa(attn_mask=m, value=v, key=k, query=q),
    *(Q, K, K, (L, S)),
)
if SINCE_2_5:
    case(
        "sdpa row without keys",
        sdpa,
        attend(EMPTY_ROW),
        *(Q, K, K),
        reference=attend_by_hand(EMPTY_ROW),
    )
    case(
        "sdpa row of infinities",
        sdpa,
        attend(torch.zeros(L, S, dtype=F64).masked_fill(~EMPTY_ROW, -math.inf)),
        *(Q, K, K),
        reference=attend_by_hand(EMPTY_ROW),
    )
    GROUPED: tuple[Shape, ...] = ((B, 4, L, E), (B, 2, S, E), (B, 2, S, E))
    case("sdpa grouped", sdpa, attend(enable_gqa=True), *GROUPED)
    case("sdpa grouped 3-D", sdpa, attend(enable_gqa=True), *(shape[1:] for shape in GROUPED))
    case("sdpa grouped, causal", sdpa, attend(enable_gqa=True, is_causal=True), *GROUPED)
    case("sdpa grouped, mask", sdpa, attend(constant(B, 4, L, S), enable_gqa=True), *GROUPED)
    case(
        "sdpa grouped, one head of keys",
        sdpa,
        attend(enable_gqa=True),
        *((B, 4, L, E), (B, 1, S, E), (B, 1, S, E)),
    )
    case("sdpa grouped in chunks", sdpa, attend(enable_gqa=True), *GROUPED, chunk=1)
case("sdpa in chunks", sdpa, sdpa, Q, K, K, chunk=1)
case(
    "sdpa in chunks of two",
    sdpa,
    sdpa,
    *[(5, *shape[1:]) for shape in (Q, K, K)],
    chunk=2 * H * L * S,
)
case("sdpa in chunks, 3-D", sdpa, sdpa, Q[1:], K[1:], K[1:], chunk=2 * L * S)
case("sdpa in chunks, mask", sdpa, attend(constant(B, 1, L, S)), Q, K, K, chunk=1)
case("sdpa in chunks, learnt mask", sdpa, sdpa, Q, K, K, (B, H, L, S), chunk=1)
case("sdpa in chunks, causal", sdpa, attend(is_causal=True), Q, K, K, chunk=1)

# --- nn.MultiheadAttention of width D

mha = F.multi_head_attention_forward
D, NH = 8, 2
FORBIDDEN = ~torch.ones(L, S, dtype=torch.bool).tril(2)
PADDING = torch.zeros(B, S, dtype=torch.bool).index_fill_(1, torch.tensor([S - 1]), True)
FLOAT_MASK, FLOAT_PADDING = constant(L, S), constant(B, S)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=F64)
MISMATCHED = "Support for mismatched key_padding_mask and attn_mask is deprecated"


def heads(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(D, NH, *args, **options)


def to_itself(**options: Any) -> Function:
    return lambda module, x: module(x, x, x, **options)


def across(**options: Any) -> Function:
    """Queries on keys that are the values too."""
    return lambda module, x, y: module(x, y, y, **options)


def apart(**options: Any) -> Function:
    return lambda module, x, y, z: module(x, y, z, **options)


X, Y = (B, L, D), (B, S, D)
first = heads(batch_first=True)
none: dict[str, Any] = {"need_weights": False}
each: dict[str, Any] = {"need_weights": True, "average_attn_weights": False}

for _kind, _how in {"": {}, " without weights": none, " with weights of heads": each}.items():
    case(f"mha{_kind}", mha, to_itself(**_how), X, inner=first)
    case(f"mha{_kind}, sequence first", mha, to_itself(**_how), (L, B, D), inner=heads())
    case(f"mha{_kind}, across", mha, across(**_how), X, Y, inner=first)
    case(
        f"mha{_kind}, across, sequence first",
        mha,
        across(**_how),
        (L, B, D),
        (S, B, D),
        inner=heads(),
    )
    case(f"mha{_kind}, apart", mha, apart(**_how), X, Y, Y, inner=first)
    for _label, _masks in {
        "bool mask": {"attn_mask": FORBIDDEN},
        "bool mask a head": {"attn_mask": constant(B * NH, L, S) > 1.5},
        "float mask": {"attn_mask": FLOAT_MASK},
        "float mask a head": {"attn_mask": constant(B * NH, L, S)},
        "bool padding": {"key_padding_mask": PADDING},
        "float padding": {"key_padding_mask": FLOAT_PADDING},
        "both bool": {"attn_mask": FORBIDDEN, "key_padding_mask": PADDING},
        "both float": {"attn_mask": FLOAT_MASK, "key_padding_mask": FLOAT_PADDING},
        "bool mask a head and padding": {
            "attn_mask": constant(B * NH, L, S) > 1.5,
            "key_padding_mask": PADDING,
        },
    }.items():
        case(f"mha{_kind}, {_label}", mha, across(**_how, **_masks), X, Y, inner=first)
    case(
        f"mha{_kind}, float mask and bool padding",
        mha,
        across(**_how, attn_mask=FLOAT_MASK, key_padding_mask=PADDING),
        *(X, Y),
        inner=first,
        warning=MISMATCHED,
    )
    case(
        f"mha{_kind}, causal",
        mha,
        to_itself(**_how, attn_mask=CAUSAL, is_causal=True),
        X,
        inner=first,
    )
    case(
        f"mha{_kind}, causal with padding",
        mha,
        to_itself(**_how, attn_mask=CAUSAL, is_causal=True, key_padding_mask=FLOAT_PADDING[:, :L]),
        X,
        inner=first,
    )
    case(
        f"mha{_kind}, learnt mask",
        mha,
        lambda module, x, y, m, how=_how: module(x, y, y, attn_mask=m, **how),
        *(X, Y, (L, S)),
        inner=first,
    )
    case(
        f"mha{_kind}, no bias", mha, to_itself(**_how), X, inner=heads(bias=False, batch_first=True)
    )
    case(
        f"mha{_kind}, across, no bias",
        mha,
        across(**_how),
        X,
        Y,
        inner=heads(bias=False, batch_first=True),
    )
    case(
        f"mha{_kind}, other widths",
        mha,
        apart(**_how),
        *(X, (B, S, 3), (B, S, 5)),
        inner=heads(kdim=3, vdim=5, batch_first=True),
    )
    case(
        f"mha{_kind}, other widths, no bias",
        mha,
        apart(**_how),
        *(X, (B, S, 3), (B, S, 5)),
        inner=heads(kdim=3, vdim=5, bias=False, batch_first=True),
    )
    case(
        f"mha{_kind}, learnt key",
        mha,
        to_itself(**_how),
        X,
        inner=heads(add_bias_kv=True, batch_first=True),
        falls_back=True,
    )
    case(
        f"mha{_kind}, zero key",
        mha,
        to_itself(**_how),
        X,
        inner=heads(add_zero_attn=True, batch_first=True),
        falls_back=True,
    )
    case(
        f"mha{_kind}, one sequence", mha, across(**_how), X[1:], Y[1:], inner=first, falls_back=True
    )
case("mha in chunks", mha, to_itself(**none), X, inner=first, chunk=1)


# --- the laws

# --- no forward AD, several outputs


class SineAndCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.sin(), x.argmax(), x**3

    @staticmethod
    def backward(ctx: Any, sine: Tensor, _: Any, cube: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return sine * x.cos() + cube * 3 * x**2


class Once(SineAndCube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sine: Tensor, _: Any, cube: Tensor) -> Tensor:
        return SineAndCube.backward(ctx, sine, _, cube)


for _function in (SineAndCube, Once):
    case(
        f"two outputs, {_function.__name__}",
        _function.apply,
        lambda x, function=_function: function.apply(x)[::2],
        (5, 3),
        reference=lambda x: (x.sin(), x**3),
        falls_back=True,
    )

names = pytest.mark.parametrize("name", CASES)


def flat(tree: Any) -> Tensor:
    """All tensors of a tree, one after another."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.detach().to_dense().to(F64).flatten() for leaf in leaves])


def error(found: Any, expected: Any, scale: Any = None) -> float:
    """Relative L2 error of all tensors together."""
    one, other = flat(found), flat(expected)
    assert one.shape == other.shape and one.isfinite().all()
    size = (other if scale is None else flat(scale)).norm().item()
    return (one - other).norm().item() / size if size > 0 else (one - other).norm().item()


def copied(tensors: Vectors) -> Vectors:
    return {name: value.clone() for name, value in tensors.items()}


def theta0(model: nn.Module) -> Vectors:
    return copied({name: value.detach() for name, value in model.named_parameters()})


def reference(one: Case, v: Vectors) -> tuple[Any, Any]:
    model = one.model(one.reference)
    found: tuple[Any, Any] = plain_jvp(model, theta0(model), v)
    return found


def gradients(d_out: Any, v: Vectors) -> list[Tensor]:
    """The gradient of a random linear functional of d_out in the directions."""
    leaves = [leaf for leaf in pytree.tree_leaves(d_out) if leaf is not None]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not leaves:
        return [torch.zeros_like(value) for value in v.values()]
    generator = torch.Generator().manual_seed(9)
    g = [torch.randn(leaf.shape, generator=generator, dtype=F64).to(leaf) for leaf in leaves]
    found = torch.autograd.grad(leaves, list(v.values()), g, allow_unused=True)
    return [torch.zeros_like(t) if f is None else f for f, t in zip(found, v.values(), strict=True)]


@names
def test_value_and_tangent_are_exact(name: str) -> None:
    one = CASES[name]
    model = one.model()
    v, state = one.randoms(model, 1), theta0(model)
    before, v_before = copied(state), copied(v)
    with one.setting(), torch.no_grad():
        out, d_out = jvp(model, state, v)
        expected, d_expected = reference(one, v)
        own = one.model()()
    assert error(out, expected) <= BAR and error(out, own) <= BAR
    assert error(d_out, d_expected) <= BAR
    assert error(v, v_before) == 0
    assert error(state, before) == 0


@names
def test_the_gradient_is_exact(name: str) -> None:
    one = CASES[name]
    model = one.model()
    v = {n: value.requires_grad_() for n, value in one.randoms(model, 1).items()}
    with one.setting():
        found = gradients(jvp(model, theta0(model), v)[1], v)
        expected = gradients(reference(one, v)[1], v)
    assert error(found, expected) <= BAR


@names
def test_two_directions_are_each_exact(name: str) -> None:
    one = CASES[name]
    model = one.model()
    vectors = [one.randoms(model, seed) for seed in (2, 3)]
    with one.setting(), torch.no_grad():
        out, found = jvps(model, theta0(model), vectors)
        for v, d_out in zip(vectors, found, strict=True):
            expected, d_expected = reference(one, v)
            assert error(out, expected) <= BAR
            assert error(d_out, d_expected) <= BAR


@names
def test_each_parameter_may_be_the_only_one_that_moves(name: str) -> None:
    one = CASES[name]
    model = one.model()
    everything = one.randoms(model, 1)
    whole = {n: value.clone().requires_grad_() for n, value in everything.items()}
    with one.setting():
        d_whole = reference(one, whole)[1]
        all_gradients = gradients(d_whole, whole)
        for index, (n, value) in enumerate(everything.items()):
            v = {n: value.clone().requires_grad_()}
            zero = {m: torch.zeros_like(t) for m, t in everything.items()}
            d_out = jvp(model, theta0(model), v)[1]
            assert error(d_out, reference(one, {**zero, **v})[1], scale=d_whole) <= BAR, n
            found = gradients(d_out, v)
            assert error(found, [all_gradients[index]], scale=all_gradients) <= BAR, n
            assert torch.equal(v[n], value), n


def recorded(patch: pytest.MonkeyPatch) -> dict[Function, list[bool]]:
    """Which functionals are looked up from now on, and whether their rules answer."""
    seen: dict[Function, list[bool]] = {}

    def watched(functional: Function, function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = function(*args, **kwargs)
            seen.setdefault(functional, []).append(answer is not NotImplemented)
            return answer

        return call

    for table in ("RULES", "COMPOSITES"):
        rules = getattr(duals, table)
        patch.setattr(duals, table, {f: watched(f, function) for f, function in rules.items()})
    return seen


@names
def test_a_case_meets_its_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = CASES[name]
    model = one.model()
    seen = recorded(monkeypatch)
    with one.setting(), torch.no_grad():
        jvp(model, theta0(model), one.randoms(model, 1))
    assert any(seen.get(one.functional, [])) != one.falls_back


# PyTorch shows these under another name: x * y as Tensor.mul, F.tanh as Tensor.tanh
SPELLINGS: set[Any] = {
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.__matmul__,
    Tensor.__truediv__,
    F.sigmoid,
    F.tanh,
}
# PyTorch has no forward AD to compare with; these are in test_guards.py
ELSEWHERE: set[Any] = {
    "torchvision::roi_align",
    "torchvision::deform_conv2d",
    torch._grouped_mm,
    F.grouped_mm,
    *recurrent.KINDS.values(),
    recurrent.recurrent_layer,
}


def test_every_rule_has_a_case() -> None:
    covered = {one.functional for one in CASES.values() if not one.falls_back}
    missing = (RULES.keys() | COMPOSITES.keys()) - covered - SPELLINGS - ELSEWHERE
    assert not missing, f"without a case in tests/tangent/test_rules.py: {missing}"


# --- what is not exact, and what only several operations show


def test_attention_with_dropout_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Applied(attend(dropout_p=0.5), (Q, K, K), None).to(F64).requires_grad_(False)
    for value in model.parameters():
        nn.init.normal_(value)
    seen = recorded(monkeypatch)
    v = {n: t.requires_grad_() for n, t in Case.randoms(model, 1).items()}
    out, d_out = jvp(model, theta0(model), v)
    assert seen == {sdpa: [False]}
    assert out.isfinite().all() and d_out.isfinite().all() and out.shape == d_out.shape
    assert all(grad.norm() > 0 for grad in gradients(d_out, v))


def test_multi_head_attention_with_dropout_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.MultiheadAttention(D, NH, dropout=0.5, batch_first=True, dtype=F64)
    model.requires_grad_(False).train()
    seen = recorded(monkeypatch)
    x = torch.randn(X, dtype=F64)
    out, d_out = jvp(model, theta0(model), Case.randoms(model, 1), x, x, x)
    assert not any(seen[mha])
    assert all(tree[0].isfinite().all() for tree in (out, d_out))


IN_PLACE: dict[str, Function] = {
    "mul_": lambda y: y.mul_(2.0),
    "relu": lambda y: F.relu(y, inplace=True),
}
ONE_ROW: dict[str, Function] = {
    "linear": lambda x, w, b: F.linear(x[0], w, b),
    "layer_norm": lambda x, _, b: F.layer_norm(x, (3,), None, b),
    "batch_norm": lambda x, _, b: F.batch_norm(x, MEAN, VAR, None, b),
}


# where only a bias moves and there is one row, the tangent of an output has the bias's own shape
@pytest.mark.parametrize("name", ONE_ROW)
@pytest.mark.parametrize("change", IN_PLACE)
def test_working_in_place_on_an_output_leaves_the_direction_alone(name: str, change: str) -> None:
    x = constant(1, 3)

    def function(w: Tensor, b: Tensor) -> Tensor:
        first_time: Tensor = ONE_ROW[name](x, w, b)
        IN_PLACE[change](first_time)
        second_time: Tensor = ONE_ROW[name](x, w, b)
        return first_time * second_time

    model = Case(F.linear, function, ((3, 3), (3,))).model()
    v = {"inputs.1": torch.ones(3, dtype=F64)}
    expected = plain_jvp(model, theta0(model), copied(v))[1]
    found = jvp(model, theta0(model), v)[1]
    assert torch.equal(v["inputs.1"], torch.ones(3, dtype=F64))
    assert error(found, expected) <= BAR


@pytest.mark.parametrize(
    "function",
    [lambda x: F.dropout(x, 0.5, training=True), lambda x: sdpa(x, x, x, dropout_p=0.5)],
    ids=["dropout", "attention"],
)
def test_random_operations_are_the_same_along_all_directions(function: Function) -> None:
    model = Case(F.linear, function, ((4, 8, 8),)).model()
    v = Case.randoms(model, 1)
    with torch.no_grad():
        one, other = jvps(model, theta0(model), [v, v])[1]
    assert error(one, other) <= BAR


def test_statistics_are_updated_once_a_pass() -> None:
    found = []
    for count in (1, 2):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(F64).requires_grad_(False)
        for value, new in zip(model.parameters(), Case.randoms(model, 0).values(), strict=True):
            value.copy_(new)
        with torch.no_grad():
            vectors = [Case.randoms(model, seed) for seed in range(count)]
            jvps(model, theta0(model), vectors, constant(5, 3))
        found.append(model.get_buffer("1.running_mean"))
    assert error(found[1], found[0]) <= BAR


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"attn_mask": constant(1, L)}, {"key_padding_mask": constant(1, L)}],
    ids=lambda options: next(iter(options)),
)
def test_what_multi_head_attention_refuses_is_refused(options: dict[str, Any]) -> None:
    model = nn.MultiheadAttention(D, NH, batch_first=True, dtype=F64).requires_grad_(False)
    x = constant(*X)
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        model(x, x, x, need_weights=False, **options)
    with pytest.raises((RuntimeError, AssertionError)) as found:
        jvp(model, theta0(model), Case.randoms(model, 1), x, x, x, need_weights=False, **options)
    assert str(found.value) == str(expected.value)


# --- an input that requires grad: PyTorch's forward AD is differentiated


def square(h: Tensor) -> Tensor:
    return h + 3 * torch.eye(3, dtype=F64)


def positive(h: Tensor) -> Tensor:
    return square(h) @ square(h).mT


def complex_(h: Tensor) -> Tensor:
    return torch.complex(square(h), h.flip(1))


ALONE = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])


def multi_head(h: Tensor) -> Tensor:
    unit = torch.eye(3, dtype=F64)
    out: Tensor = F.multi_head_attention_forward(
        h[:, None], h[:, None], h[:, None], 3, 1, unit.repeat(3, 1), None, None, None, False, 0.0,
        unit, None, need_weights=False, attn_mask=~ALONE,
    )[0]  # fmt: skip
    return out


TWICE: dict[str, Function] = {
    "solve": lambda h: torch.linalg.solve(square(h), h),
    "solve a vector": lambda h: torch.linalg.solve(square(h), h[0]),
    "solve from the right": lambda h: torch.linalg.solve(square(h), h, left=False),
    "solve vectors": lambda h: torch.linalg.solve(square(h).expand(2, 3, 3), h[:2]),
    "solve, complex": lambda h: torch.view_as_real(torch.linalg.solve(complex_(h), h + 0j)),
    "solve_ex": lambda h: torch.linalg.solve_ex(square(h), h).result,
    "tensorsolve": lambda h: torch.linalg.tensorsolve(square(h), h[0]),
    "tensorsolve, axes": lambda h: torch.linalg.tensorsolve(
        torch.block_diag(square(h), square(h)).reshape(2, 6, 3), h[:2], dims=(1,)
    ),
    "torch.det": lambda h: torch.det(square(h).flip(0)),
    "linalg.det": lambda h: torch.linalg.det(torch.stack((square(h), -positive(h)))),
    "Tensor.det": lambda h: torch.view_as_real(complex_(h).det()),
    "torch.slogdet": lambda h: torch.slogdet(square(h).flip(0))[1],
    "linalg.slogdet": lambda h: torch.view_as_real(torch.linalg.slogdet(complex_(h)).sign),
    "Tensor.slogdet": lambda h: square(h).slogdet().logabsdet,
    "torch.logdet": lambda h: torch.logdet(positive(h)),
    "Tensor.logdet": lambda h: positive(h).logdet(),
    "householder_product": lambda h: torch.linalg.householder_product(h, h[0, :2]),
    "orgqr": lambda h: torch.orgqr(h.T[:, :2], h[1, :2]),
    "Tensor.orgqr": lambda h: h.expand(2, 3, 3).orgqr(h[:2]),
    "native_layer_norm": lambda h: torch.native_layer_norm(h, (3,), h[0], h[1], 1e-5)[0],
    "instance_norm": lambda h: torch.instance_norm(
        h[None], h[0], h[1], None, None, True, 0.1, 1e-5, False
    ),
    "batch_norm": lambda h: torch.batch_norm(h, h[0], h[1], None, None, True, 0.1, 1e-5, False),
    "attention to nothing": lambda h: sdpa(h[None], h[None], h[None], attn_mask=ALONE),
    "multi-head attention to nothing": multi_head,
    "attention to nothing, -inf": lambda h: sdpa(h[None], h[None], h[None], attn_mask=ALONE.log()),
}


def layer_and(function: Function) -> nn.Module:
    model = Case(F.linear, lambda layer, x: function(layer(x)), (), lambda: nn.Linear(4, 3)).model()
    model.forward = lambda x: function(model.inner(x))  # type: ignore[operator]
    return model


@pytest.mark.parametrize("name", TWICE)
def test_j_v_is_differentiated_in_an_input(name: str) -> None:
    model, x = layer_and(TWICE[name]), constant(3, 4).requires_grad_()
    v = Case.randoms(model, 1)
    out, d_out = jvp(model, theta0(model), v, x)
    expected = model(x)
    assert error(out, expected) <= BAR
    u = torch.randn(d_out.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    leaves = {n: value.requires_grad_() for n, value in theta0(model).items()}
    with sdpa_kernel(SDPBackend.MATH):
        value = torch.func.functional_call(model, leaves, (x,))
    slopes = torch.autograd.grad((value * u).sum(), list(leaves.values()), create_graph=True)
    inner = sum((g * w).sum() for g, w in zip(slopes, v.values(), strict=True))
    assert isinstance(inner, Tensor)
    assert error((d_out * u).sum(), inner) <= BAR
    found, reference = (torch.autograd.grad(y, x) for y in ((d_out * u).sum(), inner))
    assert error(found, reference) <= 1e-10


def test_group_norm_of_no_examples_is_differentiated_in_an_input() -> None:
    model, x = layer_and(lambda h: F.group_norm(h, 3)), constant(0, 4).requires_grad_()
    d_out = jvp(model, theta0(model), Case.randoms(model, 1), x)[1]
    d_out.sum().backward()
    assert d_out.shape == (0, 3) and x.grad is not None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: torch.scatter_reduce(h, 1, COLUMNS[:, :3], h, "prod"), "scatter_reduce .*prod"),
        (lambda h: h.clone().scatter_reduce_(1, COLUMNS[:, :3], h, "prod"), "scatter_reduce_ "),
        (
            lambda h: F.instance_norm(h[None], h[0].detach(), h[1].detach()),
            "instance_norm .* statistics",
        ),
    ],
)
def test_what_is_not_differentiated_in_an_input_is_named(function: Function, reason: str) -> None:
    model, x = layer_and(function), constant(3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match=reason):
        jvp(model, theta0(model), Case.randoms(model, 1), x)
