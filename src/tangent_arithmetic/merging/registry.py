r"""Merging methods: their form, and the table of them.

A method is a pure function of one *piece*: the same part of one tensor in every model. The caller
(`merging/stream.py`) cuts tensors into pieces and joins the results, so that a method never holds a
model and knows nothing about files. The pieces of a method registered with `whole=True` are whole
tensors.

    @merging_method("simple_average", source="arXiv:2203.05482")
    def simple_average(piece: Piece) -> Tensor:
        return sum(piece.thetas) / len(piece.thetas)

Its keyword arguments are its options: names, defaults and types are read from the signature, and so
are the class in `tangent_arithmetic.merging` and the configuration in the group `method`.

A method that needs more than a piece (a threshold over the whole vector) has a `prepare`, which
reads the weights beforehand; the function gets its result as `statistics`. With `needs_data`,
`prepare` runs whole models on images instead, see `merging/examples.py`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tangent_arithmetic.runtime.errors import UsageError, closest, unknown

if TYPE_CHECKING:
    from torch import Tensor

PRETRAINED = "_pretrained_"
RESERVED = ("statistics",)
SCALE = "scaling_factor"
OWN = "tangent_arithmetic.merging."  # where the classes of the methods are found
Function = TypeVar("Function", bound="Callable[..., Tensor]")


@dataclass(frozen=True)
class Piece:
    """The same part of one tensor in every model, as vectors of one floating-point type.

    Attributes:
        name: the tensor's name.
        shape: the shape of the whole tensor.
        start: the index in the flattened tensor at which the piece starts.
        theta0: the piece of the pre-trained model, or None.
        thetas: the pieces of the models to merge, in order. They must not be modified.
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

    def by_model(self) -> dict[str, Tensor]:
        """The pieces of all models, by the models' names."""
        pieces = dict(zip(self.models, self.thetas, strict=True))
        return pieces if self.theta0 is None else {**pieces, PRETRAINED: self.theta0}


Pieces = Callable[[], Iterator[Piece]]


def per_model(value: float | Sequence[float], num_models: int) -> list[float]:
    """An option that is one number for all models, or a list of one per model, as a list."""
    return [value] * num_models if isinstance(value, int | float) else list(value)


@dataclass(frozen=True, eq=False)
class Method:
    """A registered merging method.

    Attributes:
        name: its name.
        function: (piece, **options[, statistics]) -> the merged piece.
        source: the paper that defines it.
        algorithm: the name of its class, such as "TaskArithmeticAlgorithm".
        config: the name of its configuration in the group `method`.
        prepare: (pieces, **options) -> statistics; `pieces()` reads all weights once. With
            `needs_data`: (examples, **options) -> statistics.
        passes: the most times that the pieces are read, merging included.
        needs_pretrained: whether the pre-trained model is required.
        num_models: the number of models that it merges, without the pre-trained one unless
            `ordered`; None for any number.
        whole: whether its pieces must be whole tensors.
        coefficient: the option that can be `auto`, "scaling_factor" if there is one; the merged
            weights are an affine function of it.
        scales: whether the coefficient scales the merged task vector, so that 0 gives theta0.
        largest: the largest coefficient that `auto` tries.
        ordered: whether the pre-trained model counts as the first of the models.
        drops: whether weights may be left out, so that a NaN in one need not show in the result.
        needs_data: whether it runs the models on images of their tasks.
        defaults: option -> its default.
        types: option -> its annotation.
    """

    name: str
    function: Callable[..., Tensor]
    source: str
    algorithm: str
    config: str
    prepare: Callable[..., Any] | None = None
    passes: int = 1
    needs_pretrained: bool = True
    num_models: int | None = None
    whole: bool = False
    coefficient: str | None = None
    scales: bool = True
    largest: float = 1.0
    ordered: bool = False
    drops: bool = False
    needs_data: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of the method, with defaults for those not in `given`.

        Raises:
            UsageError: for an unknown option, a missing one, or one of the wrong type.
        """
        for name in given:
            if not self.defaults:
                raise UsageError(f"{self.name} has no options, got {name!r}")
            if name not in self.defaults:
                raise UsageError(
                    f"{self.name} has no option {name!r}; its options are "
                    f"{', '.join(closest(name, self.defaults))}"
                )
        options = {**self.defaults, **given}
        if missing := [name for name, v in options.items() if v is inspect.Parameter.empty]:
            raise UsageError(f"{self.name} needs {', '.join(missing)}")
        return {name: self._typed(name, value) for name, value in options.items()}

    def changed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {n: value for n, value in options.items() if value != _plain(self.defaults[n])}

    def _typed(self, name: str, value: object) -> Any:
        """An option as a plain Python value of its annotated type."""
        kind = self.types.get(name)
        plain = _plain(value)
        if get_origin(kind) is Literal and plain not in (choices := get_args(kind)):
            raise unknown(name, str(plain), choices)
        if kind in TYPES:
            expected, fits = TYPES[kind]
            if not fits(plain):
                raise UsageError(f"{self.name}'s {name} must be {expected}, got {value!r}")
        return plain


def _plain(value: Any) -> Any:
    """Numbers and lists of PyTorch, NumPy and OmegaConf as Python's own."""
    if getattr(value, "requires_grad", False):
        raise UsageError(
            "options of a merging method are plain numbers without gradients; to differentiate "
            "through a merge, apply a task vector to a state dict, see "
            "tangent_arithmetic.TaskVector.apply_to"
        )
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


# annotation -> its name in messages, and a check of plain values
TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", _is_number),
    int: ("an integer", lambda value: type(value) is int),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a string", lambda value: type(value) is str),
    Sequence[float]: ("a list of numbers", lambda v: _is_list(v, _is_number)),
    Sequence[str]: ("a list of names", lambda v: _is_list(v, _is_name)),
    Sequence[str] | None: ("a list of names", lambda v: v is None or _is_list(v, _is_name)),
    float | Sequence[float]: (
        "a number, or a list of numbers",
        lambda v: _is_number(v) or _is_list(v, _is_number),
    ),
}
METHODS: dict[str, Method] = {}


def algorithm_name(method: str) -> str:
    """The default name of a method's class: "task_arithmetic" has `TaskArithmeticAlgorithm`."""
    return "".join(word.capitalize() for word in method.split("_")) + "Algorithm"


def merging_method(
    name: str, *, source: str, algorithm: str | None = None, config: str | None = None, **facts: Any
) -> Callable[[Function], Function]:
    """Registers a function as a merging method; its keyword arguments are its options.

    Args:
        name: the name of the method.
        source: the paper that defines it.
        algorithm: the name of its class, by default `algorithm_name(name)`.
        config: the name of its configuration in the group `method`, by default `name`.
        **facts: the other attributes of `Method`.

    Raises:
        UsageError: if another method has a class or a configuration of this name.
    """
    names = {"algorithm": algorithm or algorithm_name(name), "config": config or name}
    for other in METHODS.values():
        for kind, value in names.items():
            if other.name != name and getattr(other, kind) == value:
                raise UsageError(
                    f"the merging methods {other.name} and {name} share the {kind} name "
                    f"{value!r}; pass {kind}= to merging_method to choose another"
                )

    def register(function: Function) -> Function:
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in RESERVED
        }
        types: dict[str, Any] = {}
        with contextlib.suppress(NameError):  # an annotation imported for type checkers only
            types = get_type_hints(function)
        scale = SCALE if SCALE in defaults else None
        derived: dict[str, Any] = {**names, "defaults": defaults, "types": types}
        METHODS[name] = Method(name, function, source, **derived, **{"coefficient": scale, **facts})
        return function

    return register
