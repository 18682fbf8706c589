r"""Elementwise functionals: \(dy = f'(x)\, dx\), and products.

Their Jacobian is diagonal, hence symmetric: PyTorch's fused backward kernels compute dy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.rules.registry import Push, Tangent, rule

aten = torch.ops.aten


def _diagonal(y: Tensor, x: Tensor, backward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Push]:
    def push(d: Tangent) -> Tensor | None:
        dx = d(x)
        return None if dx is None else backward(dx.to(y.dtype))

    return y, push


@rule(F.gelu)
def gelu(input: Tensor, *, approximate: str = "none") -> tuple[Tensor, Push]:
    """GELU, exact or with the tanh approximation."""
    y = F.gelu(input, approximate=approximate)
    x = input.to(y.dtype)
    return _diagonal(y, input, lambda dx: aten.gelu_backward(dx, x, approximate=approximate))


@rule(F.silu)
def silu(input: Tensor, inplace: bool = False) -> Any:
    """SiLU, x * sigmoid(x)."""
    if inplace:
        return NotImplemented
    y = F.silu(input)
    return _diagonal(y, input, lambda dx: aten.silu_backward(dx, input))


@rule(F.relu, torch.relu, Tensor.relu)
def relu(input: Tensor, inplace: bool = False) -> tuple[Tensor, Push]:
    """ReLU; its derivative at 0 is 0."""
    y = torch.relu_(input) if inplace else torch.relu(input)
    return _diagonal(y, input, lambda dx: aten.threshold_backward(dx, y, 0))


@rule(torch.relu_, Tensor.relu_)
def relu_(input: Tensor) -> tuple[Tensor, Push]:
    """ReLU in place."""
    return relu(input, inplace=True)


@rule(torch.sigmoid, Tensor.sigmoid, F.sigmoid)
def sigmoid(input: Tensor) -> tuple[Tensor, Push]:
    """The logistic function; with `mul`, the QuickGELU of OpenAI's CLIP."""
    y = torch.sigmoid(input)
    return _diagonal(y, input, lambda dx: aten.sigmoid_backward(dx, y))


@rule(torch.tanh, Tensor.tanh, F.tanh)
def tanh(input: Tensor) -> tuple[Tensor, Push]:
    """The hyperbolic tangent."""
    y = torch.tanh(input)
    return _diagonal(y, input, lambda dx: aten.tanh_backward(dx, y))


@rule(torch.softmax, Tensor.softmax)
def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Push]:
    r"""Softmax: \(dy = y \circ (dx - \sum y \circ dx)\); its Jacobian is symmetric."""
    y = torch.softmax(input, dim, dtype=dtype)
    return _diagonal(y, input, lambda dx: aten._softmax_backward_data(dx, y, dim, y.dtype))


@rule(F.softmax)
def functional_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """Softmax with the signature of `torch.nn.functional`."""
    return NotImplemented if dim is None else softmax(input, dim, dtype)


@rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def mul(input: Tensor | float, other: Tensor | float) -> tuple[Tensor, Push]:
    """A product with broadcasting; either factor may be a number."""
    y = torch.mul(input, other)

    def push(d: Tangent) -> Tensor | None:
        left, right = d(input), d(other)
        if left is None:
            return None if right is None else torch.mul(input, right).to(y.dtype)
        if right is None:
            return torch.mul(left, other).to(y.dtype)
        return torch.mul(left, other).addcmul_(*torch.broadcast_tensors(input, right)).to(y.dtype)

    return y, push
