"""Tables in LaTeX."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tangent_arithmetic.run.latex import booktabs, document, escaped, placed


def test_a_table_with_booktabs_rules() -> None:
    table = booktabs(["%", "A_1"], [["x & y", "1.0 ± 0.5"]], bold=[[False, True]])
    assert table == (
        "% \\usepackage{booktabs}\n\\begin{tabular}{lr}\n\\toprule\n\\% & A\\_1 \\\\\n\\midrule\n"
        "x \\& y & \\textbf{1.0 $\\pm$ 0.5} \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_every_special_character_is_escaped() -> None:
    assert escaped(r"\&%$#_{}~^") == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}"
    )
    assert escaped("\u2212 \u2013 †") == "$-$ -- $\\dagger$"
    assert escaped("a<b>c|d") == r"a\textless{}b\textgreater{}c\textbar{}d"
    assert escaped("\u0394 \u03bb ≥ e\u0301") == "$\\Delta$ $\\lambda$ $\\geq$ é"
    assert escaped("--a---b") == "-{}-a-{}-{}-b"
    assert escaped("数") == "{[}U+6570{]}"


def test_columns_are_wrapped_at_a_width() -> None:
    table = booktabs(["a", "b"], [["x/y", "a_b/c"]], wrapped={1: 0.25})
    assert r"x/y & a\_\allowbreak{}b/\allowbreak{}c \\" in table
    assert r"\begin{tabular}{l>{\raggedright\arraybackslash}p{0.25\textwidth}}" in table


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_every_name_can_be_set(tmp_path: Path) -> None:
    """Each as the first cell of a row, where some marks belong to the end of the one before."""
    names = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA0, 0x180), *range(0x391, 0x3CA))]
    names += ["--flag", "[a]", "*", "x²", "ÅÉ", "a\u0301", "日本", "a_b^c", "≥ 5 ± 1 → ∞"]
    rows = [[name, name] for name in names]
    (tmp_path / "names.tex").write_text(booktabs(["%", "#"], rows[:200]), encoding="utf-8")
    (tmp_path / "more.tex").write_text(booktabs(["%", "#"], rows[200:]), encoding="utf-8")
    parts = [placed("table", name, "Table & <1>") for name in ("names", "more")]
    (tmp_path / "all.tex").write_text(document("A_B", "50 %", parts), encoding="utf-8")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:].decode("latin-1")
    log = (tmp_path / "all.log").read_text(encoding="latin-1")
    assert "Missing character" not in log and "Overfull" not in log
