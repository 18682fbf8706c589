"""The tables of certified ranges, of the files that `certify` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tangent_arithmetic.report.table import Line, Table
from tangent_arithmetic.run.modes import MODES, Mode
from tangent_arithmetic.run.present import superseded
from tangent_arithmetic.run.results import optional_results
from tangent_arithmetic.runtime.errors import UsageError

STATEMENT = (
    "Certified: the answers of the linear model on these examples, in exact arithmetic on their "
    "features. Not certified: answers on other examples, however similar, and those of the "
    "standard model with the same weights."
)


def certified_tables(folder: Path) -> list[Table]:
    """A table for each file of certificates in a run's folder.

    Damaged ones, and those of earlier checkpoints than the single tasks, are left out.
    """
    found = []
    for path in sorted(folder.glob("*certificates*.json")):
        results = optional_results(path)
        mode, ranges = mode_of(results), results.get("ranges")
        if mode is None or superseded(folder, results["provenance"], mode.name):
            continue
        if isinstance(ranges, dict):
            some = path.stem.partition("certificates")[2]  # "-A+B" of some of the suite's tasks
            found.append(_table(mode, some, results.get("control"), ranges))
    return [table for table in found if table.lines]


def mode_of(results: Mapping[str, Any]) -> Mode | None:
    """The mode that the provenance of results names; None if it names none that exists."""
    origin = results.get("provenance")
    try:
        return MODES[str(origin.get("mode"))] if isinstance(origin, dict) else None
    except UsageError:
        return None


def _table(mode: Mode, some: str, control: object, ranges: Mapping[str, Any]) -> Table:
    """The ranges of a mode's coefficients: a row a vector, a column a share of the answers."""
    about = control if isinstance(control, dict) else {}
    shares = list(dict.fromkeys(s for each in ranges.values() for s in _shares(each)))
    name = about.get("name", "the control set")
    label = mode.label + some.replace("-", ", ", 1)
    table = Table(
        f"certificates-{mode.name}{some}".replace("+", "-"),
        f"Certified ranges, {label}: coefficients that keep the answers on {name}",
        ["all stay" if share == 1 else f"{100 * share:g} % stay" for share in shares],
        corner="coefficient of",
        about=[*_said(about), STATEMENT],
    )
    for vector, each in ranges.items():
        known = _shares(each)
        cells = [_range(known[share]) if share in known else "-" for share in shares]
        table.lines.append(Line(vector, cells))
    return table


def _shares(each: object) -> dict[float, list[float | None]]:
    """The sound ranges of a vector by share, the largest share first."""
    found: dict[float, list[float | None]] = {}
    for share, ends in each.items() if isinstance(each, dict) else ():
        if isinstance(ends, list) and len(ends) == 2 and all(map(_is_end, ends)):
            try:
                found[float(share)] = ends
            except ValueError:
                continue
    return dict(sorted(found.items(), reverse=True))


def _is_end(end: object) -> bool:
    return end is None or (isinstance(end, int | float) and not isinstance(end, bool))


def _range(ends: list[float | None]) -> str:
    low, high = ends
    return (
        f"{'-inf' if low is None else f'{low:.3f}'} to {'inf' if high is None else f'{high:.3f}'}"
    )


def _said(about: Mapping[str, Any]) -> Iterable[str]:
    """What the ranges are of, and the radius of all coefficients together."""
    images, radii = about.get("images"), about.get("radii")
    count = f"{images} test examples" if isinstance(images, int) else "the test examples"
    yield (
        "In a range, all or at least this share of the pre-trained model's answers stay, on "
        f"{count} of {about.get('name', 'the control set')}; one coefficient moves, the others are "
        "0. Ranges are tight: just outside, fewer answers stay."
    )
    radius = radii.get("1") if isinstance(radii, dict) else None
    if isinstance(radius, float):
        yield (
            f"No change of all coefficients together that is shorter than {radius:.4f} (Euclidean "
            "length) changes any of these answers."
        )
