"""Numbers of a range, and the messages for others."""

from __future__ import annotations

import argparse
import math
import numbers
from collections.abc import Callable
from typing import Any

from tangent_arithmetic.runtime.errors import shown


def refused(expected: str, got: Any) -> argparse.ArgumentTypeError:
    """The error for a value that is not what was expected."""
    return argparse.ArgumentTypeError(f"expected {expected}, got {shown(got)}")


def in_range(
    kind: type,
    value: Any,
    got: Any,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """The value as a plain int or float, if it is one, finite and in the range."""
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise refused("a whole number" if kind is int else "a number", repr(got))
    try:
        found = kind(value)
    except OverflowError as error:
        raise refused("a number of ordinary size", got) from error
    if kind is float and not math.isfinite(found):
        raise refused("a finite number", got)
    if least is not None and found < least:
        raise refused(f"at least {least}", got)
    if most is not None and found > most:
        raise refused(f"at most {most:.10g}", got)
    if below is not None and found >= below:
        raise refused(f"a number below {below}", got)
    return found


def number(
    kind: type,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Callable[[str], Any]:
    """What a flag's text is turned into a number of a range by, `type=` of argparse.

    Args:
        kind: int or float.
        least: the smallest number.
        most: the largest.
        below: what it must be smaller than.
    """

    def parse(text: str) -> Any:
        return in_range(kind, kind(text), text, least, most, below)

    parse.__name__ = kind.__name__  # for argparse's message
    return parse
