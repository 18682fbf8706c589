"""The analysis of fronts, on a small run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from tangent_arithmetic.analysis import fronts
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import plain
from tangent_arithmetic.analysis.tables import read_table, table_path
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.report.page import report_path
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime.errors import UsageError
from tests.small_suite import TASKS


@pytest.fixture(autouse=True)
def figures_closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def test_the_front_of_a_pair(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fronts.DIVISIONS, 2, 2)
    pair = run.with_(pairs=["+".join(TASKS)])
    found = fronts.table(pair, ["standard", "linear"])
    assert set(found["mode"]) == {"linear"} and set(found["tasks"]) == {"+".join(TASKS)}
    assert found.groupby("point")["weight"].sum().tolist() == [1.0] * 3
    edits = Edits(run, "linear", TASKS)
    for _, rows in found.groupby("point"):
        point = dict(zip(rows["task"], rows["coefficient"], strict=True))
        for task, accuracy in zip(rows["task"], rows["accuracy"], strict=True):
            assert edits.accuracies(task, [point]) == [pytest.approx(accuracy)]
    for t, task in enumerate(TASKS):  # the end of a task has its smallest loss
        losses = found[found["task"] == task]["loss"].to_numpy()
        assert losses.argmin() == (0, 2)[t]
    figure = plain(fronts.draw, found, run)
    (axis,) = (axis for axis in figure.axes if axis.get_visible())
    assert axis.get_xlabel().startswith(TASKS[0]) and len(axis.lines[0].get_xdata()) == 3


def test_standard_models_have_no_fronts(run: Run) -> None:
    with pytest.raises(UsageError, match=r"linear models, got standard.*--finetuning-mode=linear"):
        fronts.table(run, ["standard"])


def test_the_command_writes_the_fronts_and_their_figure(
    own: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fronts.DIVISIONS, 2, 2)
    pair = f"--pairs={'+'.join(TASKS)}"
    assert analyze.main(["fronts", pair, *words]) == 0
    made = own.with_(pairs=["+".join(TASKS)])
    found = read_table(made, "fronts")
    expected = fronts.table(made, ["linear", "posthoc"])
    pd.testing.assert_frame_equal(found, expected, atol=1e-6)
    assert set(found["mode"]) == {"linear", "posthoc"}  # of those with checkpoints
    stem = table_path(made, "fronts").stem
    for kind in ("png", "svg", "pdf"):
        assert (own.results / "figures" / f"{stem}.{kind}").is_file()
    page = report_path(own).read_text(encoding="utf-8")
    assert f'<figure id="figure-{stem}">' in page and "given up on one task for another" in page


def several(*modes: str) -> pd.DataFrame:
    """Fronts of two pairs and a triple, in some modes."""
    names, rows = ("A", "B", "C"), []
    for mode, tasks in product(modes, (names, names[:2], names[1:])):
        for point, weights in enumerate(np.eye(len(tasks)).tolist()):
            for task, weight in zip(tasks, weights, strict=True):
                row = [point, task, weight, 0.1, 1.0, 0.5 + weight / 4]
                rows.append([mode, "+".join(tasks), *row])
    columns = ["mode", "tasks", "point", "task", "weight", "coefficient", "loss", "accuracy"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize("style", ["screen", "paper"])
def test_a_figure_of_many_modes(style: str, run: Run) -> None:
    modes = ["linear", "posthoc", "linear+taujp"]
    figure = plain(fronts.draw, several(*modes), run, style=style)
    figure.canvas.draw()
    pairs = [axis for axis in figure.axes if axis.get_legend() is not None]
    labels = [MODES[mode].label for mode in modes]
    assert [[t.get_text() for t in axis.get_legend().get_texts()] for axis in pairs] == [labels] * 2
    titles = {axis.get_title() for axis in figure.axes}
    assert {f"weights, {label}" for label in labels} <= titles
    width, height = figure.get_size_inches()
    assert (width, height) == ((3.25, height) if style == "paper" else (3 * 3.2, 2 * 3.2))
    assert height <= 9.5


def test_a_figure_of_three_tasks(run: Run) -> None:
    found = several("linear")
    figure = plain(fronts.draw, found[found["tasks"] == "A+B+C"], run)
    dots = figure.axes[0].collections[0]
    assert {text.get_text() for text in figure.axes[0].texts} == {"A", "B", "C"}
    np.testing.assert_allclose(dots.get_array(), 100 * (0.5 + 1 / 12))
    np.testing.assert_allclose(dots.get_offsets(), [[0, 0], [1, 0], [0.5, fronts.HEIGHT]])
