"""Published results of OpenAI's ViT-B-32, ViT-B-16 and ViT-L-14 on the eight data sets of clip8.

They are in `assets/published.csv`, in percent, in the order of `COLUMNS`, with "-" for unpublished
values and "?" after unverified ones. A value is verified if it was read in a public text, and
unverified if it was quoted from memory; the report marks the latter.

Sources: arXiv:2212.04089 (task arithmetic), arXiv:2305.12827 (tangent space); reproductions of the
same protocol by the projects aTLAS, tau-Jp, OrthoReg and TAK. Notes name other texts in which a
paper's result was read.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
EIGHT = ("Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SUN397", "SVHN")
COLUMNS = {
    "single": (*EIGHT, "mean"),
    "addition": ("absolute", "normalised"),
    "negation": ("target", "control"),
}


@dataclass(frozen=True)
class Cell:
    """A value in percent, and whether it was read in a public text."""

    value: float
    verified: bool


@dataclass(frozen=True)
class Row:
    """One published row.

    Attributes:
        label: the method, with our names of modes.
        source: the paper or project.
        note: remarks on protocol or provenance.
        cells: by column, see `COLUMNS`; unpublished ones are missing.
    """

    label: str
    source: str
    note: str
    cells: Mapping[str, Cell]


def rows(kind: str, model: str) -> list[Row]:
    """The published rows of a model; none if its weights are not OpenAI's.

    Args:
        kind: "single", "addition" or "negation".
        model: the value of `--model`. ViT-B-32, ViT-B-32-quickgelu and ViT-B-32__pretrained__openai
            all mean OpenAI's weights; files and hub names are not recognised.
    """
    name = model.removesuffix("__pretrained__openai").removesuffix("-quickgelu")
    if name not in MODELS:
        return []
    file = resources.files("tangent_arithmetic.report").joinpath("assets", "published.csv")
    published = [
        Row(line["label"], line["source"], line["note"], _cells(COLUMNS[kind], line[name]))
        for line in csv.DictReader(file.read_text(encoding="utf-8").splitlines())
        if line["kind"] == kind
    ]
    return [row for row in published if row.cells]


def _cells(columns: tuple[str, ...], text: str) -> dict[str, Cell]:
    return {
        column: Cell(float(word.removesuffix("?")), not word.endswith("?"))
        for column, word in zip(columns, text.split(), strict=True)
        if word != "-"
    }
