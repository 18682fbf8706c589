from __future__ import annotations

from tangent_arithmetic.run import tables


def test_tables() -> None:
    assert [tables.percent(value) for value in (None, 0.98765, 1.0)] == ["-", "98.8", "100.0"]
    table = tables.markdown_table(["mode", "MNIST", "a"], [["zero-shot", "9.5", "100.0"]])
    assert table.splitlines() == [
        "| mode      | MNIST |     a |",
        "|-----------|------:|------:|",
        "| zero-shot |   9.5 | 100.0 |",
    ]


def test_accuracy_table_has_the_mean_of_complete_rows_only() -> None:
    rows: dict[str, list[float | None]] = {"linear": [0.5, 0.25], "standard": [0.5, None]}
    assert tables.accuracy_table(["MNIST", "Emoji"], rows).splitlines() == [
        "| %        | MNIST | Emoji | mean |",
        "|----------|------:|------:|-----:|",
        "| linear   |  50.0 |  25.0 | 37.5 |",
        "| standard |  50.0 |     - |    - |",
    ]
