"""The text of an analogy between data sets, C+B-A=D, or C+B-A=D!W with a control."""

from __future__ import annotations

import re
from collections.abc import Iterable

FORM = r"({0})\+({0})-({0})=({0})(?:!({0}))?"  # of patterns of a name
ANY = r"[\w-]+"


def names_of_analogy(known: Iterable[str], text: str) -> list[str] | None:
    """The names in an analogy, in the order C, B, A, D, W; None if it has another form.

    Args:
        known: the names of data sets, which may have a "-"; others are found as well.
        text: the analogy.
    """
    sets = f"(?:{'|'.join(map(re.escape, known))})(?:Val)?"
    forms = (re.fullmatch(FORM.format(name), text.replace(" ", "")) for name in (sets, ANY))
    found = next(filter(None, forms), None)
    return None if found is None else [name for name in found.groups() if name is not None]
