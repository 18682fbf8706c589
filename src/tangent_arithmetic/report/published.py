"""Published results of OpenAI's ViT-B-32, ViT-B-16 and ViT-L-14 on the eight data sets of clip8.

A cell is verified if it was read in a public text, and unverified if it was quoted from memory; the
report marks the latter.

Sources: arXiv:2212.04089 (task arithmetic), arXiv:2305.12827 (tangent space); reproductions of the
same protocol by the projects aTLAS, tau-Jp, OrthoReg and TAK. Notes name other texts in which a
paper's result was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
COLUMNS = {
    "single": ("Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SUN397", "SVHN", "mean"),
    "addition": ("absolute", "normalised"),
    "negation": ("target", "control"),
}
ARITHMETIC, TANGENT = "arXiv:2212.04089", "arXiv:2305.12827"
VAL_CONTROL = "its zero-shot control is on ImageNetVal (held-out training pictures), not on test"
VAL_BUT_ONE = f"{VAL_CONTROL}; ViT-B-16 agrees with the test split"
NOTED = "verified values were read in a note on the paper"
CHOSEN = "coefficient chosen on validation"

# kind, label, source, note; per model the columns in percent, with "?" after unverified values
_ROWS = (
    ("single", "zero-shot", "aTLAS", "", (
        "59.7 44.0 45.2 32.6 48.2 60.7 63.2 31.6 48.14",
        "64.6 45.1 55.8 43.3 51.8 65.8 65.5 52.0 55.48",
        "77.8 55.3 61.3 50.6 76.4 71.0 68.3 58.4 64.89",
    )),
    ("single", "standard", "aTLAS", "", (
        "78.3 78.9 98.9 99.1 99.7 95.9 75.4 97.4 90.45",
        "84.1 81.9 98.9 98.8 99.7 96.6 78.1 97.7 91.99",
        "91.7 84.7 99.8 99.3 99.8 97.1 82.0 98.0 94.05",
    )),
    ("single", "linear", "aTLAS", "", (
        "76.3 80.0 98.0 93.7 99.3 94.6 76.4 80.0 87.28",
        "85.3 82.8 98.1 94.1 99.2 95.6 78.8 83.2 89.63",
        "89.7 83.4 98.5 95.9 99.4 96.5 82.5 91.2 92.14",
    )),
    ("addition", "zero-shot", TANGENT, "", ("48.4? -", "55.2? -", "64.4? -")),
    ("addition", "standard", TANGENT, CHOSEN, ("71.4? 76.5?", "75.5? 80.0?", "85.1? 88.8?")),
    ("addition", "linear", TANGENT, f"{CHOSEN}; 88.5 of ViT-L-14 was read on wizwand.com", (
        "76.5? 85.4?", "81.3? 86.0?", "88.5 93.5?",
    )),
    ("addition", "post-hoc", TANGENT, CHOSEN, ("57.1? 81.9?", "65.0? 85.2?", "75.2? 90.0?")),
    ("addition", "standard", ARITHMETIC, f"the best at eight tasks; {NOTED}", (
        "- -", "- -", "- 91.2",
    )),
    ("addition", "zero-shot", "tau-Jp", "", ("47.3 -", "54.5 -", "65.1 -")),
    ("addition", "standard", "tau-Jp", CHOSEN, ("70.4 78.0", "75.5 81.5", "84.0 89.3")),
    ("addition", "linear", "tau-Jp", CHOSEN, ("74.3 85.0", "78.7 87.6", "85.8 92.8")),
    ("addition", "zero-shot", "OrthoReg", "", ("47.74 -", "54.22 -", "64.54 -")),
    ("addition", "standard", "OrthoReg", CHOSEN, ("70.32 77.56", "75.39 -", "84.07 89.19")),
    ("addition", "linear", "OrthoReg", CHOSEN, ("74.68 85.27", "78.97 87.48", "86.19 93.14")),
    ("addition", "standard", "TAK", CHOSEN, ("73.5 80.4", "77.0 82.9", "84.5 89.7")),
    ("addition", "linear", "TAK", CHOSEN, ("78.8 89.9", "82.0 90.9", "88.0 94.8")),
    ("negation", "zero-shot", ARITHMETIC, "read in DV-BASI, of ViT-L-14 in a note on the paper", (
        "48.1 63.4", "55.5 68.3", "64.8 75.5",
    )),
    ("negation", "standard", ARITHMETIC, "read in DV-BASI and in a note on the paper", (
        "24.0 60.9", "21.3 65.4", "19.0 72.9",
    )),
    ("negation", "random vector", ARITHMETIC, NOTED, ("45.7? 61.5?", "53.1? 66.0?", "60.9 72.9")),
    ("negation", "gradient ascent", ARITHMETIC, NOTED, ("2.73? 0.25?", "1.93? 0.68?", "3.93 16.3")),
    ("negation", "fine-tuned", ARITHMETIC, NOTED, ("90.2? 48.2?", "92.5? 58.3?", "94.0 72.6?")),
    ("negation", "zero-shot", TANGENT, "", ("48.4? 63.4?", "55.2? 68.3?", "64.4? 75.5?")),
    ("negation", "standard", TANGENT, "least sure of ViT-B-16 and ViT-L-14, standard", (
        "24.0? 60.7?", "19.2? 64.6?", "18.0? 72.5?",
    )),
    ("negation", "linear", TANGENT, "linear figures read in DV-BASI", (
        "10.9 60.8", "11.3 64.8", "7.9 72.5",
    )),
    ("negation", "post-hoc", TANGENT, "", ("14.8? 60.3?", "10.8? 64.8?", "12.1? 71.8?")),
    ("negation", "zero-shot", "tau-Jp", VAL_CONTROL, ("47.3 66.7", "54.5 69.3", "65.1 77.3")),
    ("negation", "standard", "tau-Jp", VAL_CONTROL, ("24.0 60.7", "20.3 64.7", "18.4 72.4")),
    ("negation", "linear", "tau-Jp", VAL_CONTROL, ("11.8 60.6", "8.8 65.0", "8.3 72.2")),
    ("negation", "zero-shot", "OrthoReg", VAL_BUT_ONE, ("- 66.70", "- 68.34", "- 77.44")),
    ("negation", "standard", "OrthoReg", VAL_BUT_ONE, (
        "25.05 63.91", "20.29 66.38", "18.09 74.39",
    )),
    ("negation", "linear", "OrthoReg", VAL_BUT_ONE, ("11.47 63.99", "9.33 66.82", "8.36 74.39")),
    ("negation", "zero-shot", "TAK", "", ("48.4 63.3", "55.4 68.3", "65.0 75.5")),
    ("negation", "standard", "TAK", "", ("20.4 60.5", "20.4 65.3", "18.1 72.4")),
    ("negation", "linear", "TAK", "", ("9.3 60.5", "8.3 65.5", "7.5 72.1")),
)  # fmt: skip


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
    columns, which = COLUMNS[kind], MODELS.index(name)
    published = [
        Row(label, source, note, _cells(columns, texts[which]))
        for row_kind, label, source, note, texts in _ROWS
        if row_kind == kind
    ]
    return [row for row in published if row.cells]


def _cells(columns: tuple[str, ...], text: str) -> dict[str, Cell]:
    return {
        column: Cell(float(word.removesuffix("?")), not word.endswith("?"))
        for column, word in zip(columns, text.split(), strict=True)
        if word != "-"
    }
