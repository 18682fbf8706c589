r"""Elementwise functionals: \(dy = f'(x)\, dx\), and products.

Their Jacobian is diagonal, hence symmetric: PyTorch's fused backward kernels compute dy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.tangent.rules.registry import Push, Pushes, Tangent, composite, rule
from tangent_arithmetic.tangent.stacks import Stacks

aten = torch.ops.aten


def _diagonal(y: Tensor, x: Tensor, backward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Pushes]:
    def push(d: Tangent) -> Tensor | None:
        dx = d(x)
        return None if dx is None else backward(dx.to(y.dtype))

    def several(d: Stacks) -> Tensor | None:  # the slope is that of all directions
        dx = d(x)
        return None if dx is None else dx.values.to(y.dtype) * backward(torch.ones_like(y))

    return y, Pushes(push, several)


@rule(F.gelu)
def gelu(input: Tensor, *, approximate: str = "none") -> tuple[Tensor, Push]:
    """GELU, exact or with the tanh approximation."""
    y = F.gelu(input, approximate=approximate)
    x = input.to(y.dtype)
    return _diagonal(y, input, lambda dx: aten.gelu_backward(dx, x, approximate=approximate))


def _activation(
    function: Callable[..., Tensor], backward: Callable[..., Tensor], *names: Callable[..., Any]
) -> None:
    """Registers an activation with a backward kernel `backward(grad, x, *options)`.

    In place, the input is copied: its kernel needs the value that is overwritten.
    """

    @rule(function, *names)
    def activation(input: Tensor, *options: Any, inplace: bool = False, **more: Any) -> Any:
        if options and isinstance(options[-1], bool):
            *options, inplace = options  # type: ignore[assignment]
        x = input.detach().clone() if inplace else input
        y = function(input, *options, inplace=inplace, **more)
        return _diagonal(y, input, lambda dx: backward(dx, x, *options, **more))


def _elu_backward(grad: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    return aten.elu_backward(grad, alpha, 1.0, 1.0, False, x)  # type: ignore[no-any-return]


def _leaky_relu_backward(grad: Tensor, x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return aten.leaky_relu_backward(grad, x, negative_slope, False)  # type: ignore[no-any-return]


_activation(F.silu, aten.silu_backward)
_activation(F.mish, aten.mish_backward)
_activation(F.hardswish, aten.hardswish_backward)
_activation(F.relu6, lambda grad, x: aten.hardtanh_backward(grad, x, 0.0, 6.0))
_activation(F.elu, _elu_backward)
_activation(F.leaky_relu, _leaky_relu_backward)


@composite(F.hardsigmoid)
def hardsigmoid(input: Tensor, inplace: bool = False) -> Any:
    """The clipped line; PyTorch's own derivative rounds 1/6 to float32."""
    return NotImplemented if inplace else F.relu6(input + 3) / 6


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
    _, pushes = _diagonal(y, input, lambda dx: aten._softmax_backward_data(dx, y, dim, y.dtype))
    return y, pushes.one


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

    def several(d: Stacks) -> Tensor | None:
        left, right = d(input), d(other)
        first = None if left is None else torch.mul(left.lifted(y.ndim), other)
        if right is None:
            return first
        second = torch.mul(right.lifted(y.ndim), input)
        return second if first is None else first + second

    return y, Pushes(push, several)


@rule(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide)
def div(input: Tensor, other: Tensor | float, *, rounding_mode: str | None = None) -> Any:
    r"""A quotient with broadcasting: \(dy = (dx_1 - y\, dx_2) / x_2\)."""
    if rounding_mode is not None:
        return NotImplemented
    y = torch.div(input, other)

    def push(d: Tangent) -> Tensor | None:
        left, right = d(input), d(other)
        if right is None:
            return None if left is None else torch.div(left, other).to(y.dtype).expand(y.shape)
        step = y * right
        return ((-step if left is None else left - step) / other).to(y.dtype)

    def several(d: Stacks) -> Tensor | None:
        left, right = d(input), d(other)
        step = None if left is None else left.lifted(y.ndim)
        if right is not None:
            second = y * right.lifted(y.ndim)
            step = -second if step is None else step - second
        return None if step is None else step / other

    return y, Pushes(push, several)


@rule(torch.pow, Tensor.pow, Tensor.__pow__)
def power(input: Tensor, exponent: float) -> Any:
    """A constant power."""
    if isinstance(exponent, Tensor) or exponent == 0 or not isinstance(input, Tensor):
        return NotImplemented
    y = torch.pow(input, exponent)
    return _diagonal(y, input, lambda dx: dx * (exponent * torch.pow(input, exponent - 1)))


def _function(derivative: Callable[[Tensor, Tensor], Tensor], *names: Callable[..., Any]) -> None:
    """Registers a function of one tensor by its derivative, of x and y."""

    @rule(*names)
    def function(input: Tensor) -> tuple[Tensor, Push]:
        y = names[0](input)
        return _diagonal(y, input, lambda dx: dx * derivative(input, y))


_function(lambda x, y: 2 * x, torch.square, Tensor.square)
_function(lambda x, y: y, torch.exp, Tensor.exp)
_function(lambda x, y: 0.5 / y, torch.sqrt, Tensor.sqrt)
_function(lambda x, y: -0.5 * y / x, torch.rsqrt, Tensor.rsqrt)
