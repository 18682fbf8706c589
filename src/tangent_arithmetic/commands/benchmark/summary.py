"""Medians and ratios of what was measured, and their tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import median
from typing import Any

from tangent_arithmetic.run.tables import markdown_table

Figures = Mapping[str, Mapping[str, list[float]]]  # variant -> measure -> one value per round


def summarize(figures: Figures, ratios: Mapping[str, tuple[str, str, str]]) -> dict[str, Any]:
    """The median of each measure, and statistics of the ratios within rounds."""
    medians = {
        name: {what: median(values) for what, values in measures.items()}
        for name, measures in figures.items()
    }
    summary: dict[str, Any] = {"medians": medians, "ratios": {}}
    for name, (what, above, below) in ratios.items():
        if above in figures and below in figures and what in figures[above]:
            pairs = zip(figures[above][what], figures[below][what], strict=True)
            quotients = [a / b for a, b in pairs]
            summary["ratios"][name] = {
                "median": median(quotients),
                "least": min(quotients),
                "most": max(quotients),
                "pairs": len(quotients),
            }
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The result of `summarize` as Markdown."""
    rows = [
        [name, what, f"{value:.2f} {'GiB' if what == 'memory' else 's'}"]
        for name, measures in summary["medians"].items()
        for what, value in measures.items()
    ]
    ratios = [
        [name, f"{r['median']:.3f}", f"{r['least']:.3f} to {r['most']:.3f}", str(r["pairs"])]
        for name, r in summary["ratios"].items()
    ]
    return "\n\n".join(
        [
            markdown_table(["variant", "measure", "median"], rows),
            markdown_table(["ratio", "median", "range", "pairs"], ratios),
        ]
    )


def loading(medians: Mapping[str, Mapping[str, float]], count: int) -> dict[str, Any]:
    """Loading rates and stages.

    Args:
        medians: variant -> measure -> seconds, of the subject data.
        count: number of images.

    Returns:
        "images_per_second" by variant; "milliseconds" per image of each stage, by transform; and
        "bound", the longest stage of each.
    """
    rates = {
        name: {what: round(count / seconds, 1) for what, seconds in measures.items()}
        for name, measures in medians.items()
        if name != "stages"
    }
    facts: dict[str, Any] = {"images_per_second": rates}
    if upto := medians.get("stages"):
        stages = {}
        for kind in ("train", "val"):
            last = ("read", "decode", f"{kind}, resize", f"{kind}, all")
            ends = [0.0, *(upto[stage] for stage in last)]
            spent = [round(1000 * (b - a) / count, 3) for a, b in itertools.pairwise(ends)]
            stages[kind] = dict(zip(("read", "decode", "resize", "rest"), spent, strict=True))
        facts["milliseconds"] = stages
        facts["bound"] = {kind: max(spent, key=spent.__getitem__) for kind, spent in stages.items()}
    return facts


def loading_table(facts: Mapping[str, Any]) -> str:
    """The result of `loading` as Markdown."""
    rows = [
        [name, *(f"{rates[kind]:.0f}" for kind in ("train", "val"))]
        for name, rates in facts["images_per_second"].items()
    ]
    text = markdown_table(["images/s", "train", "val"], rows)
    for kind, spent in facts.get("milliseconds", {}).items():
        longest, total = facts["bound"][kind], sum(spent.values())
        parts = ", ".join(f"{stage} {value:.2f}" for stage, value in spent.items())
        text += (
            f"\n\n{kind}: {total:.2f} ms per image on one core ({parts}); "
            f"bound by {longest}, {100 * spent[longest] / total:.0f} % of it"
        )
    return text
