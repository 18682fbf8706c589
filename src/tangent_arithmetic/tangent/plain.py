"""PyTorch's own forward-mode AD: exact where PyTorch has a rule, composable, but slow."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.backends import differentiable, forward_ad_backends
from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.rules.normalization import by_channel, weight_norm


def operation(func: Callable[..., Any]) -> str:
    """The name of a functional, for messages."""
    return getattr(func, "__name__", str(func))


def named(error: NotImplementedError, func: Callable[..., Any]) -> NotImplementedError:
    """The error with the name of the functional that raised it, for `locating`."""
    if not hasattr(error, "operation"):
        error.operation = operation(func)  # type: ignore[attr-defined]
    return error


@contextlib.contextmanager
def locating(model: nn.Module) -> Iterator[None]:
    """Adds the operation and its module to errors about a missing forward-mode derivative."""
    try:
        yield
    except NotImplementedError as error:
        if any(phrase in str(error) for phrase in ("forward AD", "forward mode AD")):
            raise _located(error, model) from error
        raise


def _located(error: NotImplementedError, model: nn.Module) -> NotImplementedError:
    """The error with the names of the operation and of the innermost module that raised it."""
    modules = {id(module): path for path, module in model.named_modules()}
    path, kind, operation = "", type(model).__name__, getattr(error, "operation", "")
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if id(owner) in modules:
            path, kind = modules[id(owner)], type(owner).__name__
        if isinstance(owner, BackwardCFunction):
            operation = owner._forward_cls.__name__  # type: ignore[attr-defined]
        trace = trace.tb_next
    place = f"module {path!r} ({kind})" if path else f"the module itself ({kind})"
    return NotImplementedError(
        f"{operation or 'an operation'} in {place} has no forward-mode derivative: "
        f"{str(error).splitlines()[0]} Define one: a `jvp` of its autograd.Function, or a rule "
        "with tangent_arithmetic.tangent.rule"
    )


class Unfused(TorchFunctionMode):
    """Decomposes fused normalisations.

    Differentiating PyTorch's forward AD of fused normalisations treats their statistics as
    constants (PyTorch 2.14): gradients with respect to inputs and theta0 would be silently wrong.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            with differentiable(func):
                return UNFUSED.get(func, func)(*args, **(kwargs or {}))
        except NotImplementedError as error:
            raise named(error, func) from error


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = _normalized(input, list(range(-len(normalized_shape), 0)), eps)
    return _affine(y, weight, bias)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    y = _normalized(input.reshape(len(input), num_groups, -1), [-1], eps).reshape(input.shape)
    return _affine(y, *(by_channel(v, y) for v in (weight, bias)))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    y = _normalized(input, list(range(2, input.ndim)), eps)
    return _affine(y, *(by_channel(v, y) for v in (weight, bias)))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _normalized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    return (centred * torch.rsqrt(variance + eps)).to(x.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training and running_mean is None:  # of a weight-standardised convolution, for instance
        y = _normalized(input, [0, *range(2, input.ndim)], eps)
        return _affine(y, *(by_channel(v, y) for v in (weight, bias)))
    if training:
        raise NotImplementedError("PyTorch's forward AD differentiates batch statistics wrongly")
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    values, gates = input.chunk(2, dim)
    return values * torch.sigmoid(gates)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        return F.hardsigmoid(input, True)
    return F.relu6(input + 3) / 6


UNFUSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch._weight_norm: weight_norm,
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
}


def plain_jvp(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """As `tangent.jvp`, by `torch.func.jvp`: the reference, also used inside `torch.func`."""
    leaves: list[Any] = []
    spec: Any = None
    parameters = dict(model.named_parameters())
    fixed = {name: value for name, value in params0.items() if name not in tangents}
    moving = {name: params0.get(name, parameters[name].detach()) for name in tangents}

    def f(params: dict[str, Tensor]) -> list[Tensor]:
        nonlocal leaves, spec
        out = functional_call(model, {**fixed, **params}, args, kwargs)
        leaves, spec = pytree.tree_flatten(out)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    with locating(model), forward_ad_backends(), Unfused():
        steps = {name: tangents[name].to(value) for name, value in moving.items()}
        out, d_out = torch.func.jvp(f, (moving,), (steps,))[:2]

    def tree(tensors: Iterable[Tensor]) -> Any:
        """The module's output with its tensors replaced."""
        rest = iter(tensors)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(filled, spec)

    return tree(out), tree(d_out)
