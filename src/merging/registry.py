r"""What a merging method is, and the table of them.

A method is a pure function of one *piece*: the same stretch of one tensor in every model. Whoever
merges (`src/merging/stream.py`) cuts the tensors into pieces and puts the results together, so that
a method never holds a model, and knows nothing of files.

    @merging_method("simple_average", source="arXiv:2203.05482")
    def simple_average(piece: Piece) -> Tensor:
        return sum(piece.thetas) / len(piece.thetas)

A method that needs to know more than a piece (a threshold over the whole vector) has a `prepare`,
which goes over the weights beforehand and whose result the function gets as `statistics`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from src.errors import UsageError, closest, unknown

PRETRAINED = "_pretrained_"
RESERVED = ("statistics",)
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Piece:
    """The same stretch of one tensor in every model, as vectors of one floating-point type.

    Attributes:
        name: the tensor's name.
        shape: the shape of the whole tensor.
        start: where in the flattened tensor the piece begins.
        theta0: the piece in the pre-trained model; None if there is none.
        thetas: in the models to merge, in their order. None of these may be changed.
        models: the names of the models.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    theta0: Tensor | None
    thetas: tuple[Tensor, ...]
    models: tuple[str, ...]

    @property
    def base(self) -> Tensor:
        """theta0, for methods that need it."""
        assert self.theta0 is not None, "the method is registered as one that needs theta0"
        return self.theta0

    def taus(self) -> Iterator[Tensor]:
        """The pieces of the task vectors, theta - theta0, one after the other."""
        for theta in self.thetas:
            yield theta - self.base


Pieces = Callable[[], Iterator[Piece]]


@dataclass(frozen=True)
class Method:
    """A registered merging method.

    Attributes:
        name: its name.
        function: (piece, **options[, statistics]) -> the merged piece.
        source: the paper.
        prepare: (pieces, **options) -> statistics; `pieces()` goes over all weights once.
        passes: how many times at most the weights are read, the merging itself included.
        needs_pretrained: whether there has to be a pre-trained model.
        num_models: how many models it merges, without the pre-trained one unless `ordered`; None
            for any number.
        ordered: whether the pre-trained model counts as the first of the models.
        drops: whether weights may be left out, so that a NaN in one need not show in the result.
        needs_data: whether it looks at data.
        needs_models: whether it runs whole models.
    """

    name: str
    function: Callable[..., Tensor]
    source: str
    prepare: Callable[..., Any] | None = None
    passes: int = 1
    needs_pretrained: bool = True
    num_models: int | None = None
    ordered: bool = False
    drops: bool = False
    needs_data: bool = False
    needs_models: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the method, given ones over defaults.

        Raises:
            UsageError: for an option that it does not have, or one that is missing.
        """
        for name in given:
            if name not in self.defaults:
                if not self.defaults:
                    raise UsageError(f"{self.name} has no options, got {name!r}")
                raise UsageError(
                    f"{self.name} has no option {name!r}; its options are "
                    f"{', '.join(closest(name, self.defaults))}"
                )
        found = {**self.defaults, **given}
        if missing := [name for name, value in found.items() if value is inspect.Parameter.empty]:
            raise UsageError(f"{self.name} needs {', '.join(missing)}")
        return found


METHODS: dict[str, Method] = {}


def merging_method(name: str, *, source: str, **facts: Any) -> Callable[[Function], Function]:
    """Registers a function as the merging method of this name; its keywords are its options.

    Args:
        name: the name.
        source: the paper that defines it.
        **facts: the other attributes of `Method`.
    """

    def register(function: Function) -> Function:
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in RESERVED
        }
        METHODS[name] = Method(name, function, source, defaults=defaults, **facts)
        return function

    return register


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: if there is none.
    """
    if name not in METHODS:
        raise unknown("merging method", name, METHODS)
    return METHODS[name]
