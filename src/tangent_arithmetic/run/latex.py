"""Tables in LaTeX, with the rules of the package booktabs, and documents of them and of figures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi"),
    *("omega", "Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi"),
    "Omega",
)


def _greek(name: str) -> str:
    case = "SMALL" if name.islower() else "CAPITAL"
    return unicodedata.lookup(f"GREEK {case} LETTER {name.upper().replace('LAMBDA', 'LAMDA')}")


ESCAPED = {
    "\\": r"\textbackslash{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    **{mark: f"{{{mark}}}" for mark in "[]*"},  # which mean something after the end of a row
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "→": r"$\to$",
    "∞": r"$\infty$",
    "\u2212": "$-$",
    "\u2013": "--",
    **{_greek(name): rf"$\{name}$" for name in GREEK},
}
LATIN = {chr(code) for code in range(0xA0, 0x17F)} - set("ĦħĸĿŀŉŦŧ")  # that the encoding T1 has
SET = LATIN | set("\u2018\u2019\u201c\u201d\u201e\u2026\u2014\u2022\u20ac\u2122")
WRAPPED = r">{{\raggedright\arraybackslash}}p{{{}\textwidth}}"
DOCUMENT = r"""\documentclass[a4paper,landscape]{article}
\usepackage[margin=1.5cm]{geometry}
\usepackage[T1]{fontenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage{array,booktabs,caption,float,graphicx}
\newsavebox{\held}
\newcommand{\fitted}[1]{% no wider than the text, no higher than most of a page
  \sbox{\held}{#1}%
  \ifdim\wd\held>\textwidth\sbox{\held}{\resizebox{\textwidth}{!}{\usebox{\held}}}\fi
  \ifdim\dimexpr\ht\held+\dp\held\relax>.8\textheight
    \sbox{\held}{\resizebox*{!}{.8\textheight}{\usebox{\held}}}\fi
  \usebox{\held}}
\begin{document}
"""


def escaped(text: str) -> str:
    r"""Text as LaTeX; characters that its fonts lack are shown by their number.

    >>> escaped("50 % ± 1_a")
    '50 \\% $\\pm$ 1\\_a'
    >>> escaped("--a, ž, 中")
    '-{}-a, ž, {[}U+4E2D{]}'
    """
    parts = re.split("(?<=-)(?=-)", unicodedata.normalize("NFC", text))  # two hyphens are no dash
    return "{}".join("".join(map(_mark, part)) for part in parts)


def _mark(mark: str) -> str:
    if mark in ESCAPED or mark.isascii() or mark in SET:
        return ESCAPED.get(mark, mark)
    return escaped(f"[U+{ord(mark):04X}]")


def booktabs(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool] | None = None,
    bold: Sequence[Sequence[bool]] | None = None,
    wrapped: Mapping[int, float] | None = None,
) -> str:
    """A `tabular` with booktabs' rules.

    Args:
        header: names of the columns.
        rows: the cells, as text.
        right: whether each column is aligned right; by default all but the first are.
        bold: whether each cell is set in bold; by default none is.
        wrapped: columns whose text is wrapped, with their shares of the text's width; they need
            the package array.
    """
    aligned = [bool(i) for i in range(len(header))] if right is None else right
    marks = bold or [[False] * len(header)] * len(rows)
    wide = wrapped or {}

    def cell(column: int, text: str, heavy: bool) -> str:
        shown = _breakable(escaped(text)) if column in wide else escaped(text)
        return rf"\textbf{{{shown}}}" if heavy else shown

    lines = [
        " & ".join(cell(i, *one) for i, one in enumerate(zip(row, heavies, strict=True)))
        for row, heavies in zip(rows, marks, strict=True)
    ]
    body = "".join(f"{line} \\\\\n" for line in lines)
    kinds = dict(enumerate("r" if end else "l" for end in aligned))
    kinds |= {i: WRAPPED.format(share) for i, share in wide.items()}
    columns, head = "".join(kinds.values()), " & ".join(map(escaped, header))
    packages = "array,booktabs" if wide else "booktabs"
    return (
        f"% \\usepackage{{{packages}}}\n"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}"
        "\\bottomrule\n\\end{tabular}\n"
    )


def _breakable(text: str) -> str:
    """LaTeX that may be broken within paths and names."""
    return re.sub(r"/|\\_", r"\g<0>\\allowbreak{}", text)


def placed(kind: Literal["figure", "table"], file: str, caption: str) -> str:
    """A file of `booktabs`, or a figure, with a caption that gives its name; for a `document`."""
    command = {"figure": r"\includegraphics", "table": r"\footnotesize\input"}[kind]
    return (
        f"\\begin{{{kind}}}[H]\n\\centering\n\\caption*{{{escaped(caption)}}}\n"
        f"\\fitted{{{command}{{{file}}}}}\n\\end{{{kind}}}\n"
    )


def document(title: str, about: str, parts: Sequence[str]) -> str:
    """A document of `placed` tables and figures."""
    head = f"\\section*{{{escaped(title)}}}\n{escaped(about)}\n"
    return DOCUMENT + "\n".join([head, *parts]) + "\\end{document}\n"
