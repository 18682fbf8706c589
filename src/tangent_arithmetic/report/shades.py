"""The shades of a heat map in HTML: purple below 0, white at 0, green above it.

They are those of the figures' `palette.SIGNED`, without an import of Matplotlib, which would slow
down each page.
"""

from __future__ import annotations

from itertools import pairwise

PURPLE_TO_GREEN = ("#40004b", "#9970ab", "#f7f7f7", "#5aae61", "#00441b")
DARK, BRIGHT = "#111111", "#ffffff"  # of the text


def shade(value: float) -> str:
    """The CSS of a cell, with a text colour that can be read on it.

    Args:
        value: from -1 to 1; others count as the nearest of these.
    """
    stops = [_channels(colour) for colour in PURPLE_TO_GREEN]
    at = (min(max(value, -1.0), 1.0) + 1) / 2 * (len(stops) - 1)
    piece = min(int(at), len(stops) - 2)
    low, high = list(pairwise(stops))[piece]
    mixed = [round(a + (at - piece) * (b - a)) for a, b in zip(low, high, strict=True)]
    ink = max((DARK, BRIGHT), key=lambda colour: _contrast(_channels(colour), mixed))
    return f"background:#{''.join(f'{channel:02x}' for channel in mixed)};color:{ink}"


def _channels(colour: str) -> list[int]:
    """Red, green and blue of #rrggbb."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _contrast(one: list[int], other: list[int]) -> float:
    """WCAG's contrast ratio of two colours."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(channels: list[int]) -> float:
    parts = [c / 255 for c in channels]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
