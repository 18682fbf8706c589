"""Styles of figures: sizes, fonts, and one meaning of each colour."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib import colors, pyplot

from tangent_arithmetic.analysis import palette
from tangent_arithmetic.analysis.figures import overview, plain, save
from tangent_arithmetic.analysis.tables import read_table
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import collect, summarised

COMMITTED = Path(__file__).resolve().parents[2] / "results"
RUN = Run.of(Config(results=str(COMMITTED), seed=3))
DRAWN = {name: draw for parts in analyze.ANALYSES.values() for name, _, draw in parts}
OWNERS = {colors.to_hex(mode.colour): mode.label for mode in MODES.values()}


@pytest.fixture(autouse=True)
def figures_closed() -> Iterator[None]:
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", DRAWN)
def test_paper_is_a_column_wide_with_embedded_fonts(name: str, tmp_path: Path) -> None:
    table = read_table(RUN, name)
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
            first = handle[0] if len(getattr(handle, "patches", ())) else handle
            paint = first.get_facecolor() if hasattr(first, "get_facecolor") else first.get_color()
            yield label, colors.to_hex(paint)


@pytest.mark.parametrize("name", sorted(set(DRAWN) - {"layers", "subsets", "disentanglement"}))
def test_the_colour_of_a_mode_has_its_meaning_alone(name: str) -> None:
    figure = plain(DRAWN[name], read_table(RUN, name), RUN)
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
    runs = summarised(RUN)
    assert [run.seed for run in runs] == [0, 1, 2]
    summary = collect(runs)
    for style in ("screen", "paper"):
        overview(runs[0].with_(style=style), summary, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").is_file() and (tmp_path / "paper/overview.pdf").is_file()
    text = (tmp_path / "overview.svg").read_text(encoding="utf-8")
    mean = summary["single"]["linear"]["mean"]["mean"]
    assert f"{100 * mean:.1f}" in text
