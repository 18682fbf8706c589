"""Styles of figures: sizes, fonts, and one meaning of each colour."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors, pyplot
from matplotlib.lines import Line2D
from matplotlib.text import Text

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import _overview, overview, plain, save
from tangent_arithmetic.analysis.tables import read_table
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.results import arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import collect, with_seed

COMMITTED = Path(__file__).resolve().parents[2] / "results"
RUN = Run.of(Config(results=str(COMMITTED), seed=3))
DRAWN = {name: draw for parts in analyze.ANALYSES.values() for name, _, draw in parts}
COMPOSED = ("linear+taujp", "linear+tak", "linear+taujp+attention", "standard+delta")
OWNERS = {colors.to_hex(mode.colour): mode.label for mode in MODES.values()}


@pytest.fixture(autouse=True)
def figures_closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def table_of(name: str) -> pd.DataFrame:
    """The committed table of an analysis; one of our own where none is committed."""
    return NEWER[name]("linear", "posthoc") if name in NEWER else read_table(RUN, name)


def rows_of(modes: tuple[str, ...], *rows: dict[str, Any]) -> pd.DataFrame:
    """These rows for each mode."""
    return pd.DataFrame([{"mode": mode, **row} for mode in modes for row in rows])


def kernel_table(*modes: str) -> pd.DataFrame:
    """Two eigenfunctions and two tasks."""
    numbers = {"eigenvalue": 0.5, "own": 0.6, "use": 0.5}
    numbers |= {"even": 0.5, "shift": 0.0, "error": 0.01}
    rows = [{"task": t, "function": i, **numbers} for t in "AB" for i in (1, 2)]
    return rows_of(modes, *rows)


def cka_table(*modes: str) -> pd.DataFrame:
    """Two tasks."""
    return rows_of(modes, *({"task": t, "images of": i, "cka": 0.9} for t in "AB" for i in "AB"))


def ensembles_table(*modes: str) -> pd.DataFrame:
    """Two coefficients."""
    numbers = {"weights": 0.5, "ensemble": 0.6, "agreement": 0.9, "gap": 0.1}
    return rows_of(modes, *({"task": "A", "coefficient": c, **numbers} for c in (0.5, 1.0)))


def xi_table(*modes: str) -> pd.DataFrame:
    """Two pairs of tasks."""
    numbers = {"xi": 0.5, "low": 0.4, "high": 0.7, "points": 6}
    return rows_of(modes, *({"task1": "A", "task2": b, **numbers} for b in "BC"))


def seeds_table(*modes: str) -> pd.DataFrame:
    """Two sizes of subsets, and an analogy."""
    numbers = {"mean": 0.5, "std": 0.1, "seeds": 3, "binomial": 0.01}
    rows = [{"table": "subsets", "row": n, "value": "absolute", **numbers} for n in "12"]
    analogy = {"table": "analogies (mean)", "row": "c + b - a, with target", "value": "accuracy"}
    return rows_of(modes, *rows, {**analogy, **numbers})


def fronts_table(*modes: str) -> pd.DataFrame:
    """Fronts of a pair and a triple of tasks."""
    rows = [
        {"mode": mode, "tasks": "+".join(tasks), "point": point, "task": task, "weight": weight}
        | {"coefficient": 0.1, "loss": 1.0, "accuracy": 0.5 + weight / 4}
        for mode in modes
        for tasks in (("A", "B"), ("A", "B", "C"))
        for point in range(len(tasks))
        for task, weight in zip(tasks, [float(i == point) for i in range(len(tasks))], strict=True)
    ]
    return pd.DataFrame(rows)


def interference_table(*modes: str) -> pd.DataFrame:
    """Interference of three vectors on four data sets, smaller for each further mode."""
    rows = [
        {"mode": mode, "images of": images, "A": a / 10**i, "B": 0.02, "C": 0.0}
        for i, mode in enumerate(modes)
        for images, a in (("A", 0.5), ("B", 0.03), ("C", 0.01), ("Control", 0.2))
    ]
    return pd.DataFrame(rows)


def with_modes(name: str) -> pd.DataFrame:
    """A committed table, with rows of composed modes beside those of linear models."""
    table = table_of(name)
    if name == "single":
        for mode in COMPOSED:
            table[mode], table[f"advantage_{mode}"] = table["linear"], 0.1
        return table
    if name == "interference":
        return interference_table("linear", "posthoc", *COMPOSED[:3])
    if name in NEWER:
        return NEWER[name]("linear", *COMPOSED)
    columns = [column for column in table.columns if column.startswith("mode")]
    if not columns:
        return table
    own = table[(table[columns] == "linear").all(axis=1)]
    return pd.concat([table, *(own.assign(**dict.fromkeys(columns, mode)) for mode in COMPOSED)])


NEWER = {  # tables that are not committed yet
    "fronts": fronts_table,
    "interference": interference_table,
    "kernel": kernel_table,
    "cka": cka_table,
    "ensembles": ensembles_table,
    "xi": xi_table,
    "seeds": seeds_table,
}


@pytest.mark.parametrize("name", DRAWN)
def test_composed_modes_are_drawn_with_looks_of_their_own(name: str) -> None:
    table = with_modes(name)
    figure = plain(DRAWN[name], table, RUN)
    figure.canvas.draw()
    words = " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))
    if name != "analogies_few":
        assert "standard, DELTA" in words or name == "interference"
        assert all(MODES[mode].label in words for mode in COMPOSED[:3])
    looks: dict[tuple[str, str], set[str]] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if isinstance(handle, Line2D) and handle.get_marker() not in ("None", ""):
                look = colors.to_hex(handle.get_color()), str(handle.get_marker())
                looks.setdefault(look, set()).add(label)
    assert all(len(labels) == 1 for labels in looks.values()), looks
    width, height = plain(DRAWN[name], table, RUN, style="paper").get_size_inches()
    assert width == 3.25 and height <= 9.5


def test_interference_is_on_one_logarithmic_scale() -> None:
    figure = plain(DRAWN["interference"], interference_table("linear", "linear+taujp"), RUN)
    one, other = (axis.images[0] for axis in figure.axes[:2])
    assert one.norm.__class__.__name__ == "LogNorm"
    assert one.get_clim() == other.get_clim() == (0.001, 0.5)
    assert one.get_array()[1, 0] == 0.03 and other.get_array()[1, 0] == 0.003
    assert one.get_array().mask[:, 2].all()  # 0 has no logarithm
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert titles == ["linear", "linear, \u03c4Jp"]


@pytest.mark.parametrize("name", DRAWN)
def test_paper_is_a_column_wide_with_embedded_fonts(name: str, tmp_path: Path) -> None:
    table = table_of(name)
    save(plain(DRAWN[name], table, RUN, style="paper"), tmp_path, name, "a note")
    pdf = (tmp_path / "paper" / f"{name}.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", pdf)
    assert box is not None and float(box[1]) == pytest.approx(3.25 * 72)
    assert float(box[2]) <= 9.5 * 72  # fits a page
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert (tmp_path / "paper" / f"{name}.svg").is_file()


def drawn(axes: Any) -> Iterator[tuple[str, str]]:
    """The labels of lines and bars, and their colours."""
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            first = handle[0] if isinstance(handle, tuple) and handle else handle
            paint = first.get_facecolor() if hasattr(first, "get_facecolor") else first.get_color()
            yield label, colors.to_hex(paint)


@pytest.mark.parametrize("name", sorted(set(DRAWN) - {"layers", "subsets", "disentanglement"}))
def test_the_colour_of_a_mode_has_its_meaning_alone(name: str) -> None:
    figure = plain(DRAWN[name], table_of(name), RUN)
    seen = dict(drawn(figure.axes))
    for label, colour in seen.items():
        for mode in MODES.values():
            if label.removeprefix("over ") == mode.label:
                assert colour == colors.to_hex(mode.colour), label
        if colour in OWNERS and name != "analogies_few":
            assert label.removeprefix("over ") == OWNERS[colour], label


def test_the_control_and_layers_have_no_colour_of_a_mode() -> None:
    others = [palette.CONTROL, palette.REFERENCE, palette.INK, *palette.ordered(10)]
    assert not OWNERS.keys() & set(map(colors.to_hex, others))
    assert len(set(map(colors.to_hex, palette.ordered(10)))) == 10


def test_cosines_are_on_a_diverging_scale_without_the_diagonal() -> None:
    figure = plain(DRAWN["similarity"], read_table(RUN, "similarity"), RUN)
    for axis in figure.axes[:2]:
        (image,) = axis.images
        assert image.get_clim() == (-0.1, 0.1)
        masked = pd.DataFrame(image.get_array().mask).to_numpy()
        assert masked.diagonal().all() and masked.sum() == len(masked)
        assert "masked" in axis.get_title()


def test_every_task_is_named_at_its_points() -> None:
    table = read_table(RUN, "single")
    axis = plain(DRAWN["single"], table, RUN).axes[0]
    names = {text.get_text(): text.xy for text in axis.texts}
    assert set(names) == set(table["task"])
    for task, x, low in zip(table["task"], table["standard"], table["zeroshot"], strict=True):
        place = names[task]
        assert abs(place[0] - 100 * x) < 2 and place[1] <= 100 * low + 1e-9


def test_pairs_are_titles() -> None:
    table = read_table(RUN, "disentanglement")
    figure = plain(DRAWN["disentanglement"], table, RUN)
    table = table[table["mode"] == "linear"]
    assert "linear" in figure.axes[3].get_ylabel()
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles == ["Emoji + FashionMNIST", "LandCover + Letters", "MNIST + Signs"]


def test_the_overview_draws_the_spread_over_seeds(tmp_path: Path) -> None:
    runs = [with_seed(RUN, seed) for seed in range(3)]  # a run of one's own may be of one seed
    summary = collect(runs)
    for style in ("screen", "paper"):
        overview(runs[0].with_(style=style), summary, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").is_file() and (tmp_path / "paper/overview.pdf").is_file()
    text = (tmp_path / "overview.svg").read_text(encoding="utf-8")
    mean = summary["single"]["linear"]["mean"]["mean"]
    assert f"{100 * mean:.1f}" in text


def test_the_overview_has_the_mean_of_the_sweeps() -> None:
    runs = [with_seed(RUN, seed) for seed in range(3)]
    axis = plain(_overview, runs[0], collect(runs)).axes[1]
    sweeps = [load_results(arithmetic_path(run, "linear", "additions"))["val"] for run in runs]
    values = np.array([[100 * one["avg_top1"] for one in sweep.values()] for sweep in sweeps])
    (line,) = (line for line in axis.lines if line.get_label() == "linear")
    assert line.get_ydata() == pytest.approx(values.mean(axis=0))
    colour = colors.to_hex(MODES["linear"].colour)
    (band,) = (one for one in axis.collections if colors.to_hex(one.get_facecolor()[0]) == colour)
    upper = values.mean(axis=0) + values.std(axis=0, ddof=1)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(upper.max())


def test_the_overview_has_bars_of_the_modes_with_results_alone(tmp_path: Path) -> None:
    shutil.copytree(COMMITTED / "embedded/ViT-Nano-8", tmp_path / "embedded/ViT-Nano-8")
    run = Run.of(Config(results=str(tmp_path)))
    for path in (*run.results.glob("posthoc_*"), run.results / "negations.json"):
        path.unlink()
    origin = {"mode": "linear+taujp"}
    for kind in ("ft_accuracies", "additions", "negations"):
        results = json.loads((run.results / f"linear_{kind}.json").read_text())
        results["provenance"] |= origin
        (run.results / f"linear_taujp_{kind}.json").write_text(json.dumps(results))
    figure = plain(_overview, run, collect([run]))
    labels = [[tick.get_text() for tick in figure.axes[i].get_xticklabels()] for i in (0, 2)]
    assert labels[0] == ["zero-shot", "standard", "linear", "linear, \u03c4Jp"]
    assert labels[1] == ["zero-shot", "linear", "linear, \u03c4Jp"]
    assert len(figure.axes[0].patches) == 4 and len(figure.axes[2].patches) == 6
    swept = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert swept == ["standard", "linear", "linear, \u03c4Jp", "zero-shot"]
