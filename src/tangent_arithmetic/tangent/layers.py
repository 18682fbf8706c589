r"""Dense layers, whose gradients are sums of few outer products: \(G = \sum_t g_t a_t^\top\).

An example's inputs a at its tokens t and the cotangents g of the outputs are smaller than G, and
all that is wanted of G follows from them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tangent_arithmetic.tangent.directions import FACTS
from tangent_arithmetic.tangent.rules import COMPOSITES

if TYPE_CHECKING:
    from jaxtyping import Float

Names = tuple[str, ...]  # of a weight, or of a weight and its bias


@dataclass(frozen=True)
class Outer:
    r"""Matrices \(\sum_t g_t a_t^\top\), one an example, in their factors.

    Attributes:
        g: cotangents of the layer's outputs.
        a: its inputs, with 1 as the last column for a bias.
    """

    g: Float[Tensor, "batch tokens rows"]
    a: Float[Tensor, "batch tokens columns"]

    def __len__(self) -> int:
        """The number of matrices."""
        return len(self.g)

    @property
    def mT(self) -> Outer:
        """The transposed matrices."""
        return Outer(self.a, self.g)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.g.shape[-1], self.a.shape[-1]

    def dense(self) -> Float[Tensor, "batch rows columns"]:
        """The matrices themselves."""
        return self.g.mT @ self.a

    def times(self, right: Tensor) -> Float[Tensor, "batch rows k"]:
        """G X, of one X (columns, k) or one a matrix."""
        return self.g.mT @ (self.a @ right)

    def project(self, left: Float[Tensor, "rows p"], right: Float[Tensor, "columns q"]
    ) -> Float[Tensor, "batch p q"]:  # fmt: skip
        """L^T G R."""
        return (self.g @ left).mT @ (self.a @ right)

    def energy(self) -> Float[Tensor, ""]:
        """The sum of the squared entries of all matrices."""
        return ((self.g @ self.g.mT) * (self.a @ self.a.mT)).sum()


class DenseLayers:
    """Dense layers among a module's own, whose inputs and outputs can be watched.

    Args:
        module: the module.
        names: of the weight, or of weight and bias, of each layer to look for.
    """

    def __init__(self, module: nn.Module, names: Sequence[Names]) -> None:
        self.module = module
        weights = dict(module.named_parameters())
        self.names = {own[0]: tuple(own) for own in names}
        self.layers = {id(weights[own[0]]): own[0] for own in names}
        self.bias = {id(weights[own[0]]): id(weights[own[1]]) for own in names if len(own) > 1}
        self.sides = {own[0]: tuple(weights[own[0]].shape) for own in names}
        self.zeros = dict[str, Tensor]()  # of the shape of each output, by name of the weight

    def find(self, example: Float[Tensor, "1 ..."]) -> None:
        """Finds the layers that are applied once to an example, with nothing else done to them.

        Of these, only those are kept whose inputs and outputs are smaller than their weights.
        """
        outputs, elsewhere = dict[str, list[Tensor]](), set[int]()

        def seen(name: str, x: Tensor, y: Tensor) -> Tensor:
            outputs.setdefault(name, []).append(torch.zeros_like(y.detach()))
            return y

        with torch.enable_grad(), _Watch(self, seen, elsewhere):  # as when gradients are taken
            self.module(example)
        self.zeros = {
            name: found[0]
            for weight, name in self.layers.items()
            if not elsewhere & {weight, self.bias.get(weight)}
            and len(found := outputs.get(name, [])) == 1
            and sum(self.sides[name]) * found[0].shape[:-1].numel() < math.prod(self.sides[name])
        }

    def covered(self) -> set[str]:
        """Names of the parameters of the layers that were found."""
        return {name for found in self.zeros for name in self.names[found]}

    def nbytes(self) -> int:
        """Memory of an example's inputs and cotangents."""
        return sum(
            zeros.shape[:-1].numel() * sum(self.sides[name]) * zeros.element_size()
            for name, zeros in self.zeros.items()
        )

    @contextlib.contextmanager
    def shifted(self, shifts: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Adds tensors to the outputs inside the block; yields the inputs, by the weight's name.

        Raises:
            RuntimeError: if a layer is not applied exactly once, as it was in `find`.
        """
        inputs = dict[str, Tensor]()

        def seen(name: str, x: Tensor, y: Tensor) -> Tensor:
            if name not in shifts:
                return y
            if name in inputs or y.shape != shifts[name].shape:
                raise RuntimeError(f"{name} is not applied as before")
            inputs[name] = x
            return y + shifts[name]

        with _Watch(self, seen):
            yield inputs
        if inputs.keys() != shifts.keys():
            raise RuntimeError(f"{min(shifts.keys() - inputs.keys())} is not applied as before")

    def outer(self, name: str, g: Tensor, a: Tensor) -> Outer:
        """Gradients of a layer from its cotangents (batch, ..., rows) and inputs."""
        tokens = g.shape[1:-1].numel()
        g, a = (x.reshape(len(x), tokens, x.shape[-1]) for x in (g, a))
        if len(self.names[name]) > 1:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        return Outer(g, a)

    def parts(self, name: str, gradients: Outer) -> dict[str, Tensor]:
        """Gradients of a layer's weight and bias, multiplied out."""
        pieces = gradients.dense().split([self.sides[name][1], 1][: len(self.names[name])], -1)
        weight, *bias = pieces
        return dict(zip(self.names[name], [weight, *(b[..., 0] for b in bias)], strict=True))


class Composed(TorchFunctionMode):
    """Shows `apply` composite functionals, such as multi-head attention, as their parts."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in COMPOSITES:
            with self:
                out = COMPOSITES[func](*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return self.apply(func, args, kwargs or {})

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluates a functional."""
        raise NotImplementedError


class _Watch(Composed):
    """Calls back at each product with a layer's weight, and notes what else is done to tensors.

    Args:
        of: the layers.
        seen: maps the weight's name, input and output to the output.
        elsewhere: filled with the identity of each tensor that something else is done to.
    """

    def __init__(
        self,
        of: DenseLayers,
        seen: Callable[[str, Tensor, Tensor], Tensor],
        elsewhere: set[int] | None = None,
    ) -> None:
        super().__init__()
        self.of, self.seen, self.elsewhere = of, seen, elsewhere

    def apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluates a functional; of a layer's product the output is what `seen` makes of it."""
        out = func(*args, **kwargs)
        if func is F.linear and not kwargs and id(args[1]) in self.of.layers:
            x, weight, bias = args if len(args) > 2 else (*args, None)
            if self.of.bias.get(id(weight)) == (None if bias is None else id(bias)):
                return self.seen(self.of.layers[id(weight)], x, out)
        fact = getattr(func, "__name__", "") in FACTS and not isinstance(out, Tensor)
        if self.elsewhere is not None and not fact:
            self.elsewhere |= {id(value) for value in pytree.tree_leaves((args, kwargs))}
        return out
