"""PyTorch's own forward-mode AD: exact where PyTorch has a rule, composable, but slow."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.backends import differentiable, forward_ad_backends
from tangent_arithmetic.tangent.functional import functional_call
from tangent_arithmetic.tangent.state import unwrap_constants
from tangent_arithmetic.tangent.unfused import UNFUSED


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
    """Decomposes operations whose forward AD is not differentiated rightly, see `unfused.py`."""

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
        except RuntimeError as error:  # of a kernel for packed sequences, under torch.func
            if "doesn't have storage" not in str(error):
                raise
            reason = "no forward AD with torch.func of packed sequences; pass padded ones."
            raise named(NotImplementedError(reason), func) from error


def plain_jvp(
    model: nn.Module,
    params0: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor],
    /,
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
        unwrap_constants(model)
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
