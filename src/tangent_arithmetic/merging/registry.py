r"""What a merging method is, and the table of them.

A method is a pure function of one *piece*: the same stretch of one tensor in every model. Whoever
merges (`merging/stream.py`) cuts the tensors into pieces and puts the results together, so that
a method never holds a model, and knows nothing of files.

    @merging_method("simple_average", source="arXiv:2203.05482")
    def simple_average(piece: Piece) -> Tensor:
        return sum(piece.thetas) / len(piece.thetas)

A method that needs to know more than a piece (a threshold over the whole vector) has a `prepare`,
which goes over the weights beforehand and whose result the function gets as `statistics`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError, closest, unknown

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
        defaults: option -> its default.
        types: option -> its annotation.
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
    types: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the method, given ones over defaults.

        Raises:
            UsageError: for an option that it does not have, one that is missing, or one of another
                type than its annotation says.
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
        return {name: self._typed(name, value) for name, value in found.items()}

    def _typed(self, name: str, value: Any) -> Any:
        """An option as plain Python has it, which a recipe can keep."""
        kind = self.types.get(name)
        plain = _plain(value)
        if get_origin(kind) is Literal and plain not in (choices := get_args(kind)):
            raise unknown(name, str(plain), choices)
        if kind in EXPECTED and not _is_of(plain, kind):
            raise UsageError(f"{self.name}'s {name} must be {EXPECTED[kind]}, got {value!r}")
        return plain


def _plain(value: Any) -> Any:
    """Numbers and lists of torch, NumPy and OmegaConf as Python's own."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise UsageError(
            "merging writes numbers, through which no derivatives go; where these are wanted, "
            "apply a task vector to a state dict, see tangent_arithmetic.TaskVector.apply_to"
        )
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def _is_of(value: Any, kind: Any) -> bool:
    if kind in (Sequence[float], Sequence[str]):
        (inner,) = get_args(kind)
        return isinstance(value, list) and all(_is_of(each, inner) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


EXPECTED: dict[Any, str] = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a text",
    Sequence[float]: "a list of numbers", Sequence[str]: "a list of names",
}  # fmt: skip
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
        types: dict[str, Any] = {}
        with contextlib.suppress(NameError):  # an annotation that is only there for type checkers
            types = get_type_hints(function)
        METHODS[name] = Method(name, function, source, defaults=defaults, types=types, **facts)
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
