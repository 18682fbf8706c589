"""Range checks for numbers, and the error messages for values outside."""

from __future__ import annotations

import argparse
import math
import numbers
from collections.abc import Callable
from typing import Any

from tangent_arithmetic.runtime.errors import shown


def refused(expected: str, got: object) -> argparse.ArgumentTypeError:
    """The error for a value that is not what was expected."""
    return argparse.ArgumentTypeError(f"expected {expected}, got {shown(got)}")


def in_range(
    kind: type,
    value: object,
    got: object,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """The number as a plain int or float, checked to be finite, from `least` to `most`, < `below`.

    Errors show `got`, the value as the user wrote it.
    """
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise refused("a whole number" if kind is int else "a number", repr(got))
    try:
        plain = kind(value)
    except OverflowError as error:
        raise refused("a number of ordinary size", got) from error
    if kind is float and not math.isfinite(plain):
        raise refused("a finite number", got)
    if least is not None and plain < least:
        raise refused(f"at least {least}", got)
    if most is not None and plain > most:
        raise refused(f"at most {most:.10g}", got)
    if below is not None and plain >= below:
        raise refused(f"a number below {below}", got)
    return plain


def number(
    kind: type, least: float | None = None, most: float | None = None, below: float | None = None
) -> Callable[[str], Any]:
    """A parser for argparse's `type` of numbers that `in_range` accepts."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        return in_range(kind, value, text, least, most, below)

    return parse


def several(
    kind: type, least: float | None = None, most: float | None = None
) -> Callable[[str], list[Any]]:
    """A parser for argparse's `type` of comma lists of numbers; without repetitions."""
    parse = number(kind, least, most)
    return lambda text: list(dict.fromkeys(map(parse, text.split(","))))
