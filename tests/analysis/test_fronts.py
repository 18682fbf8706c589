"""The analysis of fronts, on a small run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tangent_arithmetic.analysis import fronts
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import plain
from tangent_arithmetic.run.run import Run
from tests.small_suite import TASKS


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
    figure = plain(fronts.draw, found)
    (axis,) = (axis for axis in figure.axes if axis.get_visible())
    assert axis.get_xlabel().startswith(TASKS[0]) and len(axis.lines[0].get_xdata()) == 3


def test_a_figure_of_three_tasks() -> None:
    names, rows = ("A", "B", "C"), []
    for point, weights in enumerate(np.eye(3).tolist()):
        for task, weight in zip(names, weights, strict=True):
            rows.append(["linear", "A+B+C", point, task, weight, 0.1, 1.0, 0.5 + weight / 4])
    columns = ["mode", "tasks", "point", "task", "weight", "coefficient", "loss", "accuracy"]
    figure = plain(fronts.draw, pd.DataFrame(rows, columns=columns))
    dots = figure.axes[0].collections[0]
    assert {text.get_text() for text in figure.axes[0].texts} == set(names)
    np.testing.assert_allclose(dots.get_array(), 100 * (0.5 + 1 / 12))
    np.testing.assert_allclose(dots.get_offsets(), [[0, 0], [1, 0], [0.5, fronts.HEIGHT]])
