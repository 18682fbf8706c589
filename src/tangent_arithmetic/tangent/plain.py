"""PyTorch's own forward-mode AD: exact where PyTorch has a rule, composable, but slow."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.rules.normalization import by_channel, weight_norm

FUSED_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
FUSED_RNN = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@functools.cache
def load_forward_rules() -> None:
    """Loads PyTorch's forward-mode rules, silencing a warning about torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Disables the inference fast path of `nn.MultiheadAttention`, which has no forward AD.

    It also leaves `torch.inference_mode`, which would silently discard tangents.
    """
    load_forward_rules()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    gradients = torch.is_grad_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextlib.contextmanager
def forward_ad_backends() -> Iterator[None]:
    """Disables kernels without a forward-mode rule: fused attention and the fast path."""
    with no_fast_path(), sdpa_kernel(SDPBackend.MATH):
        yield


def named(error: NotImplementedError, func: Callable[..., Any]) -> NotImplementedError:
    """The error with the name of the functional that raised it, for `locating`."""
    if not hasattr(error, "operation"):
        error.operation = getattr(func, "__name__", str(func))  # type: ignore[attr-defined]
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


def differentiable(func: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Disables kernels of a functional without forward AD: fused attention and fused RNNs."""
    name = getattr(func, "__name__", "")
    if name in FUSED_ATTENTION:
        return sdpa_kernel(SDPBackend.MATH)
    return _no_fused_rnn() if name in FUSED_RNN else contextlib.nullcontext()


@contextlib.contextmanager
def _no_fused_rnn() -> Iterator[None]:
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


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
    if training:
        raise NotImplementedError("PyTorch's forward AD differentiates batch statistics wrongly")
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


UNFUSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch._weight_norm: weight_norm,
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
        out = torch.func.functional_call(model, {**fixed, **params}, args, kwargs)
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
