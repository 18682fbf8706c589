"""Tables in LaTeX."""

from __future__ import annotations

from tangent_arithmetic.run.latex import booktabs, escaped


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
