"""Tables of newer results: solved coefficients and their map, certified ranges, exact negations."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tangent_arithmetic.analysis.figures import _overview, plain
from tangent_arithmetic.commands import certify, combine
from tangent_arithmetic.commands.combining.sums import combination_table
from tangent_arithmetic.report import explorer
from tangent_arithmetic.report import page as report
from tangent_arithmetic.report.certified import STATEMENT, certified_tables
from tangent_arithmetic.report.shades import PURPLE_TO_GREEN, shade
from tangent_arithmetic.report.solved import heat_maps, solved_of
from tangent_arithmetic.report.table import Table
from tangent_arithmetic.report.tables import tables_of
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import collect
from tangent_arithmetic.storage.reading import read_json
from tests.browser import opened
from tests.small_suite import TASKS

COMMITTED = Path(__file__).resolve().parents[2] / "results"
SUITE = ("MNIST", "Signs")


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    """A run of two tasks without results, with their folder."""
    run = Run.of(Config(results=str(tmp_path), tasks=list(SUITE)))
    run.results.mkdir(parents=True)
    return run


def write(run: Run, name: str, content: dict[str, Any], mode: str = "linear") -> None:
    """Writes a file of results."""
    text = json.dumps({**content, "provenance": {"mode": mode}})
    (run.results / f"{name}.json").write_text(text, encoding="utf-8")


def test_another_control_set_is_named(empty: Run) -> None:
    found = {"MNIST": {"test": 0.1, "test_control": 0.2}}
    origin = {"mode": "linear", "control": {"name": "Signs", "threshold": 0.95}}
    for path, content in (
        (arithmetic_path(empty, "linear", "negations"), {**found, "provenance": origin}),
        (accuracies_path(empty, "none"), {"MNIST": 0.5, "Shapes": 0.7}),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
    labels = [line.label for line in named(empty)["negation"].lines]
    assert labels == ["zero-shot", "linear, control Signs"]


def test_published_rows_stand_beside_the_eight_tasks_alone(tmp_path: Path) -> None:
    for tasks, beside in ((None, True), (["MNIST", "DTD"], False)):
        run = Run.of(Config(results=str(tmp_path), suite="clip8", model="ViT-B-32", tasks=tasks))
        path = accuracies_path(run, "none")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict.fromkeys(run.tasks, 0.5)), encoding="utf-8")
        assert any(line.published for line in named(run)["single"].lines) == beside


def test_results_of_earlier_checkpoints_stand_beside_no_newer_single_tasks(tmp_path: Path) -> None:
    """Those of linear models are of other weights than the single tasks, after retraining."""
    shutil.copytree(COMMITTED / "embedded/ViT-Nano-8", tmp_path / "embedded/ViT-Nano-8")
    run = Run.of(Config(results=str(tmp_path)))
    for mode in ("standard", "linear", "linear+taujp"):
        merged = read_json(arithmetic_path(run, mode, "additions"))
        merged["provenance"]["mode"] = mode
        merged.pop("exact", None)
        (run.results / f"merging-{mode}.json").write_text(json.dumps(merged))
    solved = read_json(run.results / "linear_combined_task-layer_4shot.json")
    before = named(run)
    assert "single tasks" in combination_table(run.with_(finetuning_mode="linear"), solved)
    path = accuracies_path(run, "linear")
    singles = read_json(path)
    singles["provenance"]["checkpoints"]["MNIST"] = "0" * 64
    path.write_text(json.dumps(singles))
    after, summary = named(run), collect([run])
    assert [line.label for line in after["single"].lines] == [
        line.label for line in before["single"].lines
    ]
    assert "single tasks" not in combination_table(run.with_(finetuning_mode="linear"), solved)
    blank = [set(line.cells) == {"-"} for line in after["merging"].lines]
    assert blank == [False, True, False]  # of linear+taujp, linear, standard
    path = accuracies_path(run, "linear+taujp")
    path.write_text(json.dumps({**read_json(path), "provenance": singles["provenance"]}))
    assert [set(line.cells) == {"-"} for line in named(run)["merging"].lines] == [True, True, False]
    path.write_bytes((COMMITTED / path.relative_to(tmp_path)).read_bytes())
    assert "run `merge` again" in " ".join(after["merging"].notes)
    axis = plain(_overview, run, summary).axes[1]
    drawn = {line.get_label() for line in axis.lines}
    assert "standard" in drawn and "linear" not in drawn
    for name, made_by in (("addition", "add"), ("negation", "negate")):
        for old, new in zip(before[name].lines, after[name].lines, strict=True):
            if old.label != "linear" and not old.label.startswith("linear, solved"):
                assert new == old
                continue
            assert set(new.cells) == {"-"} and set(new.values) == {None}
            command = "combine" if "solved" in new.label else made_by
            note = f"{new.label}: of earlier checkpoints than the single tasks; run `{command}` ag"
            assert note in " ".join(after[name].notes)
        assert set(summary[name]) == set(collect([run.with_(results=str(COMMITTED))])[name]) - {
            "linear"
        }
    assert "linear" in summary["single"] and "linear" not in summary["solved"]
    maps = {name for name in before if name.startswith("coefficients-linear-4")}
    assert maps and set(before) - set(after) == maps
    assert explorer.presets_of(run, "linear").keys() == {
        "Zero-shot", "Sum of all", *(f"Only {task}" for task in run.tasks)
    }  # fmt: skip


def combined(coefficients: dict[str, Any], **solved: float) -> dict[str, Any]:
    return {"coefficients": coefficients, "uniform": 0.25, "test": {"solved": solved}}


def named(run: Run) -> dict[str, Table]:
    return {table.name: table for table in tables_of(run)}


# --- of a real run


def test_what_the_commands_write_is_on_the_page(own: Run, words: list[str], browser: Any) -> None:
    for grouping in ("task", "task-layer"):
        argv = ["--finetuning-mode=linear", f"--coefficients={grouping}", *words]
        assert combine.main(argv) == 0
    assert certify.main(["--finetuning-mode=linear", *words]) == 0
    path = own.results / f"linear_combined_task-layer_tasks{'+'.join(TASKS)}.json"
    results, tables = read_json(path), named(own)
    label = "linear, Emoji+FashionMNIST, solved: task-layer"
    (line,) = [one for one in tables["addition"].lines if one.label == label]
    test = [results["test"]["solved"][task] for task in TASKS]
    single = load_results(accuracies_path(own, "linear"))
    normalised = sum(v / single[task] for v, task in zip(test, TASKS, strict=True)) / 2
    assert line.values[:4] == pytest.approx((*test, sum(test) / 2, normalised))
    assert line.cells[4] == f"{len(results['coefficients'])} solved"
    labels = [one.label for one in tables["addition"].lines]
    tuned = labels.index("linear, Emoji+FashionMNIST")
    assert labels[tuned + 1 : tuned + 3] == [label.removesuffix("-layer"), label]
    chart = tables[f"coefficients-linear-{'-'.join(TASKS)}"]
    shown = {
        f"{row.label}/{column}": cell
        for row in chart.lines
        for column, cell in zip(chart.columns, row.cells, strict=True)
    }
    assert shown == {name: f"{value:.2f}" for name, value in results["coefficients"].items()}
    with opened(browser, report.write_report(own)) as page:
        cells = page.locator(f"#{chart.name} tbody td")
        assert cells.count() == len(results["coefficients"])
        colours = cells.evaluate_all("all => all.map(i => getComputedStyle(i).backgroundColor)")
        assert len(set(colours)) > 2
        ranges = page.locator(f"#certificates-linear-{'-'.join(TASKS)}")
        certified = read_json(arithmetic_path(own, "linear", "certificates"))["ranges"]
        assert ranges.locator("tbody th").all_text_contents() == list(certified)
        low, high = certified["Emoji"]["0.95"]
        last = ranges.locator("tbody tr").first.locator("td").last.text_content()
        assert last == f"{low:.3f} to {high:.3f}"
        assert STATEMENT in ranges.locator(".note").all_text_contents()
        assert page.locator("dt", has_text="solved").count() == 1
        assert "exact" in page.locator("#negation thead th").all_text_contents()


def test_the_exact_optimum_of_negations(own: Run) -> None:
    results = load_results(arithmetic_path(own, "linear", "negations"))
    table = named(own)["negation"]
    assert table.columns[-2:] == ["exact", "control at exact"]
    rows = {line.label: line.cells[-2:] for line in table.lines}
    expected = [
        sum(results[task]["exact"][key] for task in TASKS) / 2 for key in ("test", "test_control")
    ]
    assert rows["linear"] == [f"{100 * value:.1f}" for value in expected]
    assert rows["standard"] == rows["zero-shot"] == ["-", "-"]
    assert "<dt>exact, control at exact</dt>" in report.page_of(own, None)


# --- layout


def newer(folder: Path) -> Run:
    """A copy of the committed run, each of whose seeds has what newer versions write."""
    shutil.copytree(COMMITTED / "embedded", folder / "embedded")
    run = Run.of(Config(results=str(folder), seed=3))
    tasks, layers = list(run.suite.tasks), ["embedding", *(f"block {i}" for i in range(6)), "head"]
    solved = {f"{task}/{layer}": i / 7 - 0.3 for task in tasks for i, layer in enumerate(layers)}
    ranges = {task: {"1": [-0.0123, 0.0456], "0.95": [-0.1, None]} for task in tasks}
    for path in (folder / "embedded").glob("ViT-Nano-8*/*linear_*.json"):
        content = read_json(path)
        if path.stem == "linear_additions":
            content["test_at_1"] = content["test"]
        elif path.stem == "linear_negations":
            for task in tasks:
                content[task]["exact"] = {"test": 0.123, "test_control": 0.456}
        path.write_text(json.dumps(content), encoding="utf-8")
        one = run.with_(seed=content["provenance"]["seed"] or None)
        write(one, "linear_combined_task-layer", combined(solved, **dict.fromkeys(tasks, 0.5)))
        write(one, "linear_certificates", {"ranges": ranges, "control": {"name": "Shapes"}})
    return run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `newer`."""
    path = tmp_path_factory.mktemp("newer") / "report.html"
    path.write_text(report.page_of(newer(path.parent), None), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_newer_tables_fit(browser: Any, file: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800}
    with opened(browser, file, viewport=size, color_scheme=scheme) as page:
        names = page.locator("main > section:has(> .scroll)").evaluate_all(
            "all => all.map(i => i.id)"
        )
        assert names == [
            *("single", "addition", "coefficients-linear", "negation", "certificates-linear")
        ]
        heads = page.locator("#addition thead th").all_text_contents()
        assert heads[-4:] == ["mean", "normalised", "coefficient", "mean at 1"]
        labels = page.locator("#addition tbody th").all_text_contents()
        assert "linear, solved: task-layer, 4 seeds" in labels
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        hidden = page.locator("main > section > .scroll").evaluate_all(
            "all => all.map(i => i.scrollWidth - i.clientWidth)"
        )
        assert width < 1280 or hidden == [0] * 5  # no table needs scrolling on a desk
        for box in page.locator("h2, .note, .files, nav a").evaluate_all(
            "all => all.map(i => i.getBoundingClientRect().toJSON())"
        ):
            assert box["left"] >= 0 and box["right"] <= width


def test_the_newer_tables_fit_on_paper(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport={"width": 1030, "height": 700}) as page:
        page.emulate_media(media="print")
        right = page.locator("main td, main thead th").evaluate_all(
            "all => all.map(i => i.getBoundingClientRect().right)"
        )
        assert max(right) <= 1030


# --- of files that are written here


def test_rows_and_maps_by_mode(empty: Run) -> None:
    write(empty, "ft_accuracies", {"MNIST": 0.8, "Signs": 0.5}, "standard")
    write(
        empty, "combined_task-layer", combined({"MNIST/a": 1.0}, MNIST=0.4, Signs=0.5), "standard"
    )
    write(
        empty, "linear_combined_layer_4shot", combined({"a": 1.0, "b": 0.5}, MNIST=0.4, Signs=0.6)
    )
    tables = named(empty)
    assert {line.label: line.cells for line in tables["addition"].lines} == {
        "standard, MNIST+Signs, solved: task-layer": ["40.0", "50.0", "45.0", "75.0", "1 solved"],
        "linear, MNIST+Signs, solved: layer, 4-shot": ["40.0", "60.0", "50.0", "-", "2 solved"],
    }
    assert [name for name in tables if name.startswith("coefficients")] == ["coefficients-standard"]


def test_a_map_is_shaded_from_its_largest_coefficient(empty: Run) -> None:
    values = {"MNIST/embedding": -0.5, "MNIST/head": 0.0, "Signs/head": 0.25}
    write(empty, "linear_combined_task-layer_entropy", combined(values, MNIST=0.5))
    (table,) = heat_maps(solved_of(empty.results))
    assert table.columns == ["embedding", "head"]
    assert [line.cells for line in table.lines] == [["-0.50", "0.00"], ["", "0.25"]]
    assert table.name == "coefficients-linear-entropy" and not table.ranked
    shades = [style.partition(";")[0] for line in table.lines for style in line.styles]
    ends = [f"background:{colour}" for colour in PURPLE_TO_GREEN]
    assert shades == [ends[0], ends[2], "", ends[3]]
    assert "from -0.50, purple, over 0, white, to 0.50, green" in table.about[0]
    assert "one coefficient for all: 0.25" in table.about[0]
    assert table.csv().splitlines()[0] == "coefficient,embedding,head"


def test_shades_can_be_read_on() -> None:
    found = [shade(value / 10) for value in range(-12, 13)]
    assert found[0] == found[2] and found[-1] == found[-3]  # beyond the ends
    assert {style.partition("color:")[2].partition(";")[0] for style in found}
    inks = [re.findall("color:(#......)$", style)[0] for style in found]
    assert inks[0] == inks[-1] == "#ffffff" and inks[12] == "#111111"


def test_certified_ranges(empty: Run) -> None:
    ranges = {
        "MNIST": {"0.95": [None, 0.5], "1": [-0.1234, 0.1]},
        "sum of all": {"1": [None, None]},
    }
    control = {"name": "Shapes", "images": 640, "radii": {"1": 0.0625}}
    write(empty, "linear_certificates", {"ranges": ranges, "control": control})
    (table,) = certified_tables(empty.results)
    assert table.columns == ["all stay", "95 % stay"]
    rows = {line.label: line.cells for line in table.lines}
    assert rows == {
        "MNIST": ["-0.123 to 0.100", "-inf to 0.500"],
        "sum of all": ["-inf to inf", "-"],
    }
    first, second, third = table.notes
    assert "640 test examples of Shapes" in first and "shorter than 0.0625" in second
    assert third == STATEMENT and "Not certified" in third
    assert "linear" in table.title and "Shapes" in table.title


@pytest.mark.parametrize("name", ["linear_combined_task-layer", "linear_certificates"])
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"provenance": 1, "ranges": {"A": {"1": [0, 1]}}}',
        '{"provenance": {"mode": "of another version"}, "coefficients": {"A/b": 1}}',
        '{"provenance": {"mode": "linear"}, "coefficients": {"A/b": "1"}, "test": [1]}',
        '{"provenance": {"mode": "linear"}, "ranges": {"A": {"one": [0, 1], "1": [0]}, "B": 1}}',
        '{"provenance": {"mode": "linear"}, "ranges": {"A": {"1": ["a", 1]}}}',
        '{"provenance": {"mode": "linear"}, "ranges": {"A": {"1": [0, true]}}}',
        '{"provenance": {"mode": "linear"}, "ranges": [], "control": 3, "test": {"solved": {}}}',
    ],
)
def test_damaged_files_stop_no_page(name: str, content: str, empty: Run) -> None:
    (empty.results / f"{name}.json").write_text(content)
    page = report.write_report(empty).read_text(encoding="utf-8")
    assert "Provenance" in page and page.rstrip().endswith("</html>")
    assert "solved:" not in page and "coefficients-" not in page


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("task", "task"),
        ("task-layer_16shot", "task-layer, 16-shot"),
        ("layer_2shot_selflabel", "layer, 2-shot, selflabel"),
        ("attn_in_proj-0a1b2c3d_entropy", "attn_in_proj-0a1b2c3d, entropy"),
    ],
)
def test_names_of_files_are_spelt_out(slug: str, name: str, empty: Run) -> None:
    write(empty, f"linear_combined_{slug}", combined({"MNIST": 0.5}, MNIST=0.5))
    assert [one.name for one in solved_of(empty.results)] == [name]
