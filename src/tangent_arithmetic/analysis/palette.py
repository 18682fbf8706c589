"""Colours of figures and pages, each with one meaning everywhere.

Modes have the colours of `run/modes.py`: zero-shot grey, standard vermilion, linear blue, post-hoc
orange. They are safe for the colour-blind, after Okabe and Ito; modes also differ in markers.
"""

from __future__ import annotations

from typing import Any

from tangent_arithmetic.run.modes import MODES

ZEROSHOT = MODES["none"].colour
STANDARD = MODES["standard"].colour
CONTROL = "#009e73"  # the control set
REFERENCE = "#8c8c8c"  # diagonals, thresholds
INK = "#333333"  # error bars, notes
MAGNITUDE = "viridis"  # errors, from 0
SIGNED = "PRGn"  # cosines: purple negative, white zero, green positive
LAYERS = "viridis"  # from the first layer, dark, to the last, bright

HATCHES = {  # kinds of vectors
    "task": "",
    "random": "////",
    "others": "....",
    "ascent": "xxxx",
    "ascent, whole": "\\\\\\\\",
}


def ordered(count: int) -> list[Any]:
    """Colours of `count` things in an order, such as layers."""
    from matplotlib import colormaps

    steps = max(1, count - 1)
    return [colormaps[LAYERS](k / steps) for k in range(count)]
