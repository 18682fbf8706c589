"""Replaces a module's parameters by dual tensors, created when the module reads them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from tangent_arithmetic.tangent.state import of_the_pass

Tangents = Mapping[str, Tensor]  # a direction by name of parameter
CACHED = 8  # dual tensors kept after a read, since a module may read a weight several times


class NeedsForwardAD(Exception):
    """A module differentiates in its forward pass; rules would hide tangents from that."""


class Displacement(Mapping[str, Tensor]):
    r"""The tangents \(\theta - \theta_0\), computed on access and never stored.

    Differences are computed in at least float32 and cast to the dtype of theta0. Gradients with
    respect to a difference accumulate in theta.

    Args:
        theta: the weights, by name.
        theta0: the point of expansion, with at least these names.
    """

    def __init__(self, theta: Mapping[str, Tensor], theta0: Mapping[str, Tensor]) -> None:
        self.theta, self.theta0 = theta, theta0

    def __getitem__(self, name: str) -> Tensor:
        theta, theta0 = self.theta[name], self.theta0[name]
        wide = torch.promote_types(theta.dtype, torch.float32)
        step: Tensor = usable(theta).to(wide) - usable(theta0).to(wide)
        return step.to(theta0.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.theta  # without forming the difference

    def __iter__(self) -> Iterator[str]:
        return iter(self.theta)

    def __len__(self) -> int:
        return len(self.theta)


def usable(value: object) -> Any:
    """The value, cloned if it is an inference tensor, which forward-mode AD cannot use."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def leaf(tangents: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that receives the gradient with respect to a tangent."""
    return tangents.theta[name] if isinstance(tangents, Displacement) else tangents[name]


class AtTheta0(torch.autograd.Function):
    r"""\(\theta_0\) in the forward pass, the identity in the backward pass.

    The graph of the primal pass then ends in the tangent, which receives
    \(J(x; \theta_0)^\top g\), the gradient of \(g^\top J v\) with respect to v.
    """

    @staticmethod
    def forward(ctx: Any, tangent: Tensor, theta0: Tensor) -> Tensor:
        """theta0, not copied."""
        ctx.dtype = tangent.dtype
        return theta0.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Passes the gradient with respect to theta0 on to the tangent."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a backward pass without create_graph; for second derivatives of a "
                "linearised model, nest torch.func.jacrev or grad around "
                "torch.func.functional_call, which uses PyTorch's own forward AD"
            )
        return grad.to(ctx.dtype), None


class _Pairs(dict[str, Any]):
    """A module's parameters; reading one returns `make` of it."""

    def __init__(self, parameters: Mapping[str, Any], make: Callable[[Tensor], Tensor]) -> None:
        super().__init__(parameters)
        self._make = make

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value if value is None else self._make(value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - dict.get would bypass __getitem__

    def __iter__(self) -> Iterator[str]:  # dict(self) would bypass __getitem__ without it
        return super().__iter__()

    def items(self) -> Any:
        return ((name, self[name]) for name in self)

    def values(self) -> Any:
        return (self[name] for name in self)


@contextlib.contextmanager
def swapped(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    at_once: bool = False,
) -> Iterator[OrderedDict[str, Tensor]]:
    """Replaces the weights of a module inside the block.

    Args:
        model: the module; its weights are restored on exit. Buffers that it assigns keep their new
            values.
        parameters: its own parameters by name.
        values: buffers by name; missing ones stay. Names of parameters are ignored.
        make: returns the parameter with a name; called when a module reads it. Tied parameters have
            one name.
        at_once: makes all parameters on entry and keeps them to the end, so that transforms inside
            the forward pass find them made.

    Yields:
        The parameters that were read last, by name; those taken out are made again.
    """
    names = {id(value): name for name, value in parameters.items()}
    cached: OrderedDict[str, Tensor] = OrderedDict()
    if at_once:
        cached.update((name, make(name)) for name in names.values())

    def read(parameter: Tensor) -> Tensor:
        name = names.get(id(parameter))
        if name is None:  # created by the forward pass itself
            return parameter
        if name not in cached:
            if peek_interpreter_stack() is not None:
                raise NeedsForwardAD("it uses torch.func in its forward pass")
            cached[name] = make(name)
            if len(cached) > CACHED:
                cached.popitem(last=False)
        return cached[name]

    originals: list[tuple[nn.Module, Any, dict[str, Any], dict[str, Tensor]]] = []
    try:
        for path, module in model.named_modules():
            state = module.__dict__
            parameters = state["_parameters"]
            originals.append((module, parameters, *_lend(module, path, values)))
            if parameters:
                state["_parameters"] = _Pairs(parameters, read)
        yield cached
    finally:
        cached.clear()
        for module, parameters, _, _ in originals:
            module.__dict__["_parameters"] = parameters
        for module, _, buffers, given in originals:
            _put_back(module, buffers, given)


@contextlib.contextmanager
def buffers_lent(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Replaces the buffers of a module inside the block, as `swapped` does.

    Args:
        model: the module; the buffers of a scripted one stay.
        values: buffers and others, by all their names.

    Yields:
        The values that replace nothing yet.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):
        yield values
        return
    lent = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    originals: list[tuple[nn.Module, dict[str, Any], dict[str, Tensor]]] = []
    try:
        for path, module in modules.items():
            originals.append((module, *_lend(module, path, values)))
        yield {name: value for name, value in values.items() if name not in lent}
    finally:
        for module, buffers, given in originals:
            _put_back(module, buffers, given)


def _lend(
    module: nn.Module, path: str, values: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Replaces a module's buffers, except emptied caches; its own, and the replacements."""
    buffers = module.__dict__["_buffers"]
    own, prefix = dict(buffers), f"{path}." if path else ""
    names = [name for name, value in own.items() if value is not None and prefix + name in values]
    given = {name: values[prefix + name] for name in names}
    buffers.update(given)
    return own, given


def _put_back(module: nn.Module, buffers: dict[str, Any], given: Mapping[str, Tensor]) -> None:
    """Restores a module's buffers, with the values that the forward pass has assigned to them.

    Values that mean nothing outside the pass stay, for `Attributes` to find.
    """
    now = module.__dict__["_buffers"]
    for name, original in buffers.items():
        value, before = now.get(name), given.get(name, original)
        if value is not before and of_the_pass(value):
            continue
        now[name] = original
        if value is before or not isinstance(value, Tensor):
            continue
        if isinstance(before, Tensor) and before.shape == value.shape:
            with torch.no_grad():
                before.copy_(value)
        elif name in given:
            raise RuntimeError(
                f"expected a forward pass that keeps the shape of its buffers, got "
                f"{type(module).__name__}, which makes {name!r} {tuple(value.shape)} instead of "
                f"{tuple(given[name].shape)}"
            )
        else:
            now[name] = value.detach()
