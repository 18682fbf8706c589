"""The page's contents, tables, files and widths, from committed and from other results."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from tangent_arithmetic.commands import analyze
from tangent_arithmetic.report import page as report
from tangent_arithmetic.report.table import Table
from tangent_arithmetic.report.tables import tables_of
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.results import load_results
from tangent_arithmetic.run.run import Run
from tests.browser import opened

COMMITTED = Path(__file__).resolve().parents[2] / "results"
RUN = Run.of(Config(results=str(COMMITTED), seed=3))
SIZES = [
    (360, "light"),
    (360, "dark"),
    (400, "light"),
    (768, "light"),
    (768, "dark"),
    (1280, "light"),
]


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {table.name: table for table in tables_of(RUN)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the committed run, without its explorer."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.page_of(RUN, None), encoding="utf-8")
    return path


def contents(link: str) -> bytes:
    """What a data URL holds."""
    return base64.b64decode(link.partition("base64,")[2])


def test_the_contents_lead_to_every_part(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        links = page.locator("nav a").all()
        assert [link.text_content() for link in links] == [
            *("Tangent explorer", "Single-task accuracy", "Task addition", "Task negation"),
            *("Figures", "Definitions", "Provenance"),
        ]
        headings = page.locator("main h2").count()
        assert headings == len(links)
        for link in links:
            link.click()
            target = page.locator(link.get_attribute("href"))
            assert target.count() == 1 and target.locator("h2").count() == 1


def test_terms_are_defined_and_provenance_is_folded(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        terms = page.locator("dt").all_text_contents()
        assert {"zero-shot", "post-hoc", "normalised", "control"} <= set(terms)
        assert not page.locator(".origins").is_visible()
        page.locator("summary").click()
        assert page.locator(".origins").is_visible()


def test_figures_have_takeaways_and_files(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        figures = page.locator("figure").all()
        assert len(figures) == 9
        for figure in figures:
            name = figure.get_attribute("id").removeprefix("figure-")
            assert len(figure.locator(".takeaway").text_content()) > 20
            for kind in ("svg", "pdf"):
                path = RUN.results / "figures" / f"{name}.{kind}"
                if path.is_file():
                    link = figure.locator(f'a[download="{name}.{kind}"]')
                    assert contents(link.get_attribute("href")) == path.read_bytes()


def test_figures_are_shown_as_drawn_and_in_less_than_half_the_bytes(
    browser: Any, file: Path
) -> None:
    with opened(browser, file) as page:
        for figure in page.locator("figure").all():
            name = figure.get_attribute("id").removeprefix("figure-")
            path = RUN.results / "figures" / f"{name}.png"
            shown = contents(figure.locator("img").get_attribute("src"))
            assert len(shown) < path.stat().st_size / 2
            with Image.open(io.BytesIO(shown)) as one, Image.open(path) as other:
                assert ImageChops.difference(one.convert("RGBA"), other).getbbox() is None
            assert figure.locator("img").evaluate("i => i.decode().then(() => i.naturalWidth)") > 0


def test_tables_are_downloaded_as_they_are_read(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        for name in ("single", "addition", "negation"):
            section = page.locator(f"#{name}")
            shown = section.locator("tr").evaluate_all(
                "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
            )
            with page.expect_download() as download:
                section.get_by_role("link", name="CSV").click()
            text = Path(download.value.path()).read_text(encoding="utf-8")
            assert list(csv.reader(io.StringIO(text))) == shown
            tex = contents(section.locator('a[download$=".tex"]').get_attribute("href")).decode()
            assert tex.count("\\\\") == len(shown) and "\\toprule" in tex
            bold = section.locator("td.best").all_text_contents()
            assert re.findall(r"\\textbf\{(.*?)\}", tex) == bold and bold


@pytest.mark.parametrize(("name", "lower"), [("addition", False), ("negation", True)])
def test_the_best_of_a_column_is_bold(name: str, lower: bool, tables: dict[str, Table]) -> None:
    table = tables[name]
    own = [line for line in table.lines if line.own and line.label != "zero-shot"]
    assert [line.label for line in own][:3] == ["standard", "linear", "post-hoc"]
    marked = {line.label: [best for _, best in cells] for line, cells in table.rows}
    for i, column in enumerate(table.columns):
        known = {line.label: line.values[i] for line in own}
        values = {label: value for label, value in known.items() if value is not None}
        if column == "coefficient" or not values:
            assert not any(flags[i] for flags in marked.values())
            continue
        best = min if lower and not column.startswith("control") else max
        top = f"{100 * best(values.values()):.1f}"
        expected = {label for label, value in values.items() if f"{100 * value:.1f}" == top}
        assert {label for label, flags in marked.items() if flags[i]} == expected


def test_the_spread_over_seeds(tables: dict[str, Table]) -> None:
    (line,) = [line for line in tables["addition"].lines if line.label == "linear, 4 seeds"]
    means = [
        100
        * load_results(RUN.results.parent / f"ViT-Nano-8{end}" / "linear_additions.json")["test"][
            "avg_top1"
        ]
        for end in ("", "_seed1", "_seed2", "_seed3")
    ]
    cell = line.cells[tables["addition"].columns.index("mean")]
    assert cell == f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}"
    assert "over seeds 0, 1, 2, 3" in line.note


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    run = Run.of(Config(results=str(tmp_path)))
    run.results.mkdir(parents=True)
    (run.results / "zeroshot_accuracies.json").write_text('{"MNIST": 0.5}')
    (run.results.parent / "ViT-Nano-8_seedling").mkdir()
    (table,) = tables_of(run)
    assert [line.label for line in table.lines] == ["zero-shot"] and not table.notes


def test_several_labels_a_picture(tmp_path: Path) -> None:
    run = Run.of(Config(results=str(tmp_path)))
    run.results.mkdir(parents=True)
    sums = {"test": {"MNIST:map": 0.25, "avg_top1": 0.25}, "coefficient": 0.5}
    (run.results / "additions.json").write_text(json.dumps(sums))
    (run.results / "ft_accuracies.json").write_text('{"MNIST": 0.5}')
    tables = {table.name: table for table in tables_of(run)}
    assert tables["addition"].lines[0].cells == ["25.0", "25.0", "-", "0.5"]


@pytest.fixture(scope="module")
def shared(browser: Any, file: Path) -> Iterator[tuple[Any, Path]]:
    yield browser, file


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_nothing_overflows_or_is_hidden(shared: tuple[Any, Path], width: int, scheme: str) -> None:
    browser, file = shared
    size = {"width": width, "height": 800}
    with opened(browser, file, viewport=size, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("nav a", "h2", "figure img", ".takeaway", "dd", ".button"):
            for box in page.locator(selector).evaluate_all(
                "all => all.map(i => i.getBoundingClientRect().toJSON())"
            ):
                assert box["width"] > 0 and box["left"] >= 0 and box["right"] <= width
        if width == 1280:  # tables need no scrolling on a desk
            wide = page.locator("main > section > .scroll").evaluate_all(
                "all => all.map(i => i.scrollWidth - i.clientWidth)"
            )
            assert wide == [0, 0, 0]


def test_printed_on_paper(browser: Any, file: Path, tmp_path: Path) -> None:
    landscape = {"width": 1030, "height": 700}  # CSS pixels of A4 without its margins
    with opened(browser, file, viewport=landscape, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1030
        right = page.locator("main td, main thead th").evaluate_all(
            "all => all.map(i => i.getBoundingClientRect().right)"
        )
        assert max(right) <= 1030
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back == "rgb(255, 255, 255)"
        assert page.locator("nav").is_hidden() and page.locator(".best").first.is_visible()
        page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    assert (tmp_path / "page.pdf").stat().st_size > 100_000  # with its figures


@pytest.mark.slow
def test_redrawn_figures_come_with_latex(tmp_path: Path) -> None:
    shutil.copytree(COMMITTED / "embedded", tmp_path / "embedded")
    run = RUN.with_(results=str(tmp_path))
    shutil.rmtree(run.results / "figures")
    (tmp_path / "embedded/figures/overview.png").unlink()
    analyze.analyze(run, ["figures"])
    assert len(list((run.results / "figures").glob("*.pdf"))) == 9
    assert (tmp_path / "embedded/figures/overview.pdf").is_file()
    made = {path.stem for path in (run.results / "analysis").glob("*.tex")}
    assert made == {"single", "negation_random", "analogies_few"}
