"""Options of registered functions: their names, defaults and types come from the signature."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tangent_arithmetic.runtime.errors import UsageError, closest, unknown

RESERVED = ("statistics",)


@dataclass(frozen=True, eq=False, kw_only=True)
class Registered:
    """A registered function, whose keyword arguments are its options.

    Attributes:
        name: its name.
        function: (piece, **options[, statistics]) -> its result for the piece.
        source: the paper that defines it.
        prepare: (pieces, **options) -> statistics; `pieces()` reads all weights once.
        defaults: option -> its default.
        types: option -> its annotation.
    """

    name: str
    function: Callable[..., Any]
    source: str
    prepare: Callable[..., Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Any] = field(default_factory=dict)

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options, with defaults for those not in `given`.

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


def signature(function: Callable[..., Any]) -> dict[str, Any]:
    """The attributes `defaults` and `types` of a function, see `Registered`.

    Only options are looked at: other annotations may be imported for type checkers only.

    Raises:
        UsageError: if the annotation of an option is not defined at run time.
    """
    options = {
        parameter.name: parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in RESERVED
    }
    stated = {name: each.annotation for name, each in options.items()}
    annotated = {name: kind for name, kind in stated.items() if kind is not inspect.Signature.empty}
    try:
        known = getattr(inspect.unwrap(function), "__globals__", {})
        types = get_type_hints(SimpleNamespace(__annotations__=annotated), known)
    except NameError as error:
        raise UsageError(
            f"an option of {function.__name__} has an annotation that is not defined at run time "
            f"({error}); import it outside of TYPE_CHECKING"
        ) from error
    return {"defaults": {name: each.default for name, each in options.items()}, "types": types}


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
    """Whether a value is a finite number within the range of float64."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _is_list(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str)


# annotation -> its name in messages, and a check of plain values
TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a finite number", _is_number),
    int: ("an integer", lambda value: type(value) is int),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a string", lambda value: type(value) is str),
    Sequence[float]: ("a list of finite numbers", lambda v: _is_list(v, _is_number)),
    Sequence[str]: ("a list of names", lambda v: _is_list(v, _is_name)),
    Sequence[str] | None: ("a list of names", lambda v: v is None or _is_list(v, _is_name)),
    Mapping[str, Any] | None: (
        "a mapping of names to values",
        lambda v: v is None or isinstance(v, Mapping),
    ),
    float | Sequence[float]: (
        "a finite number, or a list of them",
        lambda v: _is_number(v) or _is_list(v, _is_number),
    ),
}
