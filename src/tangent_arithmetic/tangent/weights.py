"""The weights of a run: pairs of a value and its tangent, made when a module reads them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 8  # pairs that stay alive after a read: a module may read a weight several times


class Displacement(Mapping[str, Tensor]):
    r"""The tangents \(\theta - \theta_0\), each formed when it is read and never kept.

    Differences are formed in at least float32 and then cast to the type of theta0. A gradient with
    respect to a difference is one with respect to theta.

    Args:
        theta: the weights, by name.
        theta0: the point of expansion, with at least these names.
    """

    def __init__(self, theta: Mapping[str, Tensor], theta0: Mapping[str, Tensor]) -> None:
        self.theta, self.theta0 = theta, theta0

    def __getitem__(self, name: str) -> Tensor:
        theta, theta0 = self.theta[name], self.theta0[name]
        wide = torch.promote_types(theta.dtype, torch.float32)
        return (usable(theta).to(wide) - usable(theta0).to(wide)).to(theta0.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.theta)

    def __len__(self) -> int:
        return len(self.theta)


def usable(value: Any) -> Any:
    """A tensor made under `torch.inference_mode` as one that forward-mode AD may use."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def leaf(tangents: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that the gradient with respect to a tangent belongs to."""
    return tangents.theta[name] if isinstance(tangents, Displacement) else tangents[name]


class AtTheta0(torch.autograd.Function):
    r"""\(\theta_0\) in the forward pass, the identity in the backward pass.

    The graph of the primal pass then ends in the tangent: what flows back to it is
    \(J(x; \theta_0)^\top g\), the gradient of \(g^\top J v\) with respect to v.
    """

    @staticmethod
    def forward(ctx: Any, tangent: Tensor, theta0: Tensor) -> Tensor:
        """The value of theta0, without a copy."""
        ctx.dtype = tangent.dtype
        return theta0.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient with respect to theta0 is that with respect to the tangent."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a backward pass without create_graph: second derivatives of a "
                "linearised model go through torch.func.jacrev or grad, nested, of "
                "torch.func.functional_call, which takes PyTorch's own forward AD"
            )
        return grad.to(ctx.dtype), None


class _Pairs(dict[str, Any]):
    """A module's own parameters; reading one gives what `make` makes of it."""

    def __init__(self, own: Mapping[str, Any], make: Callable[[Tensor], Tensor]) -> None:
        super().__init__(own)
        self._make = make

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value if value is None else self._make(value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - dict.get passes us by

    def items(self) -> Any:
        return ((name, self[name]) for name in self)

    def values(self) -> Any:
        return (self[name] for name in self)


@contextlib.contextmanager
def swapped(
    model: nn.Module, values: Mapping[str, Tensor], make: Callable[[str], Tensor]
) -> Iterator[None]:
    """Gives the modules other weights inside the block.

    Args:
        model: whose modules they are; its own weights are back on exit.
        values: buffers by name; those of others stay. Names of parameters are passed over.
        make: gives a parameter by its name; called when a module reads it. Tied parameters have
            one name.
    """
    names = {id(value): name for name, value in model.named_parameters()}
    kept: OrderedDict[str, Tensor] = OrderedDict()

    def read(own: Tensor) -> Tensor:
        name = names.get(id(own))
        if name is None:  # made by the forward pass itself
            return own
        if name not in kept:
            kept[name] = make(name)
            if len(kept) > KEPT:
                kept.popitem(last=False)
        return kept[name]

    originals: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    try:
        for path, module in model.named_modules():
            state, prefix = module.__dict__, f"{path}." if path else ""
            parameters, buffers = state["_parameters"], state["_buffers"]
            originals.append((module, parameters, dict(buffers)))
            if parameters:
                state["_parameters"] = _Pairs(parameters, read)
            buffers.update({n: values[prefix + n] for n in buffers if prefix + n in values})
        yield
    finally:
        kept.clear()
        for module, parameters, buffers in originals:
            module.__dict__["_parameters"] = parameters
            module.__dict__["_buffers"].update(buffers)
