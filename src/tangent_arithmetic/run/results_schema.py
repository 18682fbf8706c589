"""Results files: their keys and the types of their values, and what of a damaged one is sound."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tangent_arithmetic.runtime.errors import shown
from tangent_arithmetic.storage.reading import readable

Check = Callable[[Any, str, list[str]], Any]  # (value, its place, faults) -> its sound part
LEFT_OUT = object()  # what a check gives where nothing is sound
TWICE = object()  # stands for a value that an object has twice, differently
SHARES = ("top1", ":map", ":balanced")  # ends of the keys of shares
DEEPEST = 4  # levels of a provenance's own facts


def read(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The sound part of a results file, and what is wrong with the rest.

    What a file may hold beside its provenance follows from its name: "additions" a sum,
    "negations" a record a task, "accuracies" a number a data set, "combined" and "negated"
    the facts of solved coefficients, "stress" those of perturbed merges, another one any of the
    others.

    Raises:
        MissingFileError: if it is not there.
        UsageError: if it is no JSON object.
    """
    with readable(path, "a JSON object of results"):
        text = Path(path).read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=_object)
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")
        faults: list[str] = []
        stem = Path(path).stem
        if any(word in stem for word in SOLVED):
            return _table({"provenance": _table(ORIGIN, _fact)}, _fact)(found, "", faults), faults
        if STRESS.fullmatch(stem):
            return STRESSED(found, "", faults), faults
        kinds = (check for word, check in KINDS.items() if word in stem)
        return _table(FILE, next(kinds, _any_kind))(found, "", faults), faults


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that it has twice, with different values, has neither."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = TWICE if key in found and found[key] != value else value
    return found


def _wrong(value: Any, where: str, faults: list[str], expected: str) -> Any:
    if value is TWICE:
        got = "two values"
    else:
        got = f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
    faults.append(f"{shown(where or 'the file')}: expected {expected}, got {shown(got, 40)}")
    return LEFT_OUT


def _number(low: float, high: float, expected: str) -> Check:
    def check(value: Any, where: str, faults: list[str]) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and low <= value <= high else _wrong(value, where, faults, expected)

    return check  # NaN is in no range


def _of_type(kind: Any, expected: str) -> Check:
    def check(value: Any, where: str, faults: list[str]) -> Any:
        return value if isinstance(value, kind) else _wrong(value, where, faults, expected)

    return check


def _table(known: Mapping[str, Check], other: Check) -> Check:
    """Checks an object: the values of known keys by name, those of others by `other`."""

    def check(value: Any, where: str, faults: list[str]) -> Any:
        if not isinstance(value, dict):
            return _wrong(value, where, faults, "an object")
        found = {}
        for key, inner in value.items():
            place = f"{where} > {key}" if where else key
            sound = known.get(key, other)(inner, place, faults)
            if sound is not LEFT_OUT:
                found[key] = sound
        return found

    return check


def _metric(value: Any, where: str, faults: list[str]) -> Any:
    share = where.endswith(SHARES) and "normalized" not in where.rpartition(" > ")[2]
    return (SHARE if share else AMOUNT)(value, where, faults)


def _sweep(value: Any, where: str, faults: list[str]) -> Any:
    """Metrics by coefficient, whose keys are spelt as short decimals."""
    if not isinstance(value, dict):
        return _wrong(value, where, faults, "an object")
    found: dict[str, Any] = {}
    for key, inner in value.items():
        coef, place = short_decimal(key), f"{where} > {key}"
        if coef is None or coef in found:
            _wrong(key, place, faults, "each coefficient once, as a number")
        elif (metrics := METRICS(inner, place, faults)) is not LEFT_OUT:
            found[coef] = metrics
    return found


def short_decimal(text: str) -> str | None:
    """A coefficient's text as a short decimal, "0.15" of "0.15000000000000002"; None if none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return str(round(value, 10)) if abs(value) <= sys.float_info.max else None


def _fact(value: Any, where: str, faults: list[str], depth: int = DEEPEST) -> Any:
    """Anything of JSON that is not deep."""
    if depth == 0 or value is TWICE:
        return _wrong(value, where, faults, f"at most {DEEPEST} levels")
    if isinstance(value, dict):
        inner = {k: _fact(v, f"{where} > {k}", faults, depth - 1) for k, v in value.items()}
        return {k: v for k, v in inner.items() if v is not LEFT_OUT}
    if isinstance(value, list):
        items = [_fact(item, where, faults, depth - 1) for item in value]
        return [item for item in items if item is not LEFT_OUT]
    return value


def _words(value: Any, where: str, faults: list[str]) -> Any:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return _wrong(value, where, faults, "a list of texts")
    return value


def _any_kind(value: Any, where: str, faults: list[str]) -> Any:
    return (RECORD if isinstance(value, dict) else SHARE)(value, where, faults)


AMOUNT = _number(-sys.float_info.max, sys.float_info.max, "a finite number")
SHARE = _number(0, 1, "a number from 0 to 1")
TEXT = _of_type(str | None, "a text")
WHOLE = _of_type(int | None, "a whole number")
METRICS = _table({}, _metric)
RECORD = _table(
    {
        **dict.fromkeys(("test", "test_control", "zeroshot", "zeroshot_control"), SHARE),
        "val": _sweep,
        "coefficient": AMOUNT,
        "qualified": _of_type(bool, "true or false"),
    },
    _fact,
)
NAMES = ("model", "suite", "mode", "commit", "source", "device", "machine", "theta0_hash")
ORIGIN = {
    "argv": _words,
    "config": _table({}, _fact),
    **dict.fromkeys(("versions", "checkpoints", "splits", "heads"), _table({}, TEXT)),
    "control": _table({"name": TEXT, "threshold": SHARE}, _fact),
    **dict.fromkeys(("seed", "world_size"), WHOLE),
    "seconds": AMOUNT,
    **dict.fromkeys(NAMES, TEXT),
}
SUM = {
    **dict.fromkeys(("test", "test_at_1", "zeroshot"), METRICS),
    "val": _sweep,
    "coefficient": AMOUNT,
    "interference": _table({}, _table({}, AMOUNT)),
}
FILE = {  # a table's origin is its own file
    **ORIGIN,
    **SUM,
    "provenance": _table(ORIGIN, _fact),
    "earlier": _table({}, _table(ORIGIN, _fact)),
}
SOLVED = ("combined_", "negated_")  # files of `combine`
STRESS = re.compile(r"(\w+_)?stress")  # files of `merge stress`
BY_TASK = {"top1": _table({}, SHARE)}
CASE = _table(
    {**BY_TASK, "perturbed": _table({}, _table({**BY_TASK, "lost": AMOUNT}, _fact))}, _fact
)
STRESSED = _table(
    {
        "provenance": _table(ORIGIN, _fact),
        "methods": _table({}, _table({"plain": CASE, "normalised": CASE}, _fact)),
    },
    _fact,
)
KINDS: dict[str, Check] = {"additions": _fact, "negations": RECORD, "accuracies": SHARE}
