"""Tables in LaTeX, with the rules of the package booktabs."""

from __future__ import annotations

from collections.abc import Sequence

ESCAPED = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "\u03c4": r"$\tau$",
    "\u2212": "$-$",
    "\u2013": "--",
}
PREAMBLE = "% \\usepackage{booktabs}\n"


def escaped(text: str) -> str:
    r"""Text as LaTeX.

    >>> escaped("50 % ± 1_a")
    '50 \\% $\\pm$ 1\\_a'
    """
    return "".join(ESCAPED.get(mark, mark) for mark in text)


def booktabs(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool] | None = None,
    bold: Sequence[Sequence[bool]] | None = None,
) -> str:
    """A `tabular` with booktabs' rules.

    Args:
        header: names of the columns.
        rows: the cells, as text.
        right: whether each column is aligned right; by default all but the first are.
        bold: whether each cell is set in bold; by default none is.
    """
    aligned = [bool(i) for i in range(len(header))] if right is None else right
    marks = bold or [[False] * len(header)] * len(rows)
    lines = [
        " & ".join(
            rf"\textbf{{{escaped(cell)}}}" if heavy else escaped(cell)
            for cell, heavy in zip(row, heavies, strict=True)
        )
        for row, heavies in zip(rows, marks, strict=True)
    ]
    body = "".join(f"{line} \\\\\n" for line in lines)
    columns = "".join("r" if end else "l" for end in aligned)
    head = " & ".join(map(escaped, header))
    return (
        f"{PREAMBLE}\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}"
        "\\bottomrule\n\\end{tabular}\n"
    )
