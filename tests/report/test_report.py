"""The report page of a run: made after each evaluation, whole, and read in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import _overview, plain
from tangent_arithmetic.commands import analyze
from tangent_arithmetic.commands import evaluate as eval_single_task
from tangent_arithmetic.report import explorer
from tangent_arithmetic.report import page as report
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import write_summary
from tests.browser import browsing, opened
from tests.run.test_results_schema import damaged
from tests.small_suite import TASKS


def rows_of(page: str, title: str) -> dict[str, list[str]]:
    """The rows of a table, by label."""
    table = page[page.index(f"<h2>{title}") :]
    table = table[: table.index("</table>")]
    found = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table)
    return {label: re.findall("<td>(.*?)</td>", cells) for label, cells in found}


def test_each_evaluation_leaves_a_page(args: Config) -> None:
    page = report.report_path(Run.of(args)).read_text(encoding="utf-8")
    single = rows_of(page, "Single-task accuracy")
    assert list(single) == ["zero-shot", "standard", "linear", "post-hoc"]
    for mode, label in (("none", "zero-shot"), ("linear", "linear")):
        values = [load_results(accuracies_path(Run.of(args), mode))[task] for task in TASKS]
        assert single[label] == [f"{100 * v:.1f}" for v in (*values, sum(values) / 2)]
    addition = rows_of(page, "Task addition")
    test = load_results(arithmetic_path(Run.of(args), "posthoc", "additions"))
    assert addition["post-hoc, Emoji+FashionMNIST"] == [
        *(f"{100 * test['test'][f'{task}:top1']:.1f}" for task in TASKS),
        f"{100 * test['test']['avg_top1']:.1f}",
        f"{100 * test['test']['avg_normalized_top1']:.1f}",
        f"{float(test['coefficient']):g}",
    ]
    negated = load_results(arithmetic_path(Run.of(args), "standard", "negations"))
    kept = sum(negated[task]["test_control"] for task in TASKS) / 2
    assert rows_of(page, "Task negation")["standard"][-1] == f"{100 * kept:.1f}"
    for name in ("linear_negations.json", "zeroshot_accuracies.json"):
        assert f'<th scope="row">{name}</th>' in page
    assert "python src/analyze.py report" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


def test_a_folder_of_another_project_makes_a_page(tmp_path: Path) -> None:
    args = Config(model="ViT-B-32", results=str(tmp_path))
    folder = Run.of(args).results
    folder.mkdir(parents=True)
    (folder / "zeroshot_accuracies.json").write_text(json.dumps({"Cars": 0.6, "DTD": 0.44}))
    (folder / "additions.json").write_text(
        json.dumps({"test": {"Cars:top1": 0.7, "avg_top1": 0.65}, "val": {}, "coefficient": 0.3})
    )
    page = report.write_report(Run.of(args)).read_text(encoding="utf-8")
    single = rows_of(page, "Single-task accuracy")
    assert single["zero-shot"] == ["60.0", "44.0", "52.0"]
    assert single["zero-shot (aTLAS)"] == ["59.7", "44.0", "48.1"]
    addition = rows_of(page, "Task addition")
    assert addition["standard"] == ["70.0", "-", "65.0", "-", "0.3"]
    assert addition["standard (arXiv:2305.12827)"] == ["", "", "71.4 †", "76.5 †", ""]
    assert addition["standard (TAK)"] == ["", "", "73.5", "80.4", ""]
    assert "† recalled, not read in a public text: unverified." in page
    assert "Task negation" not in page


def test_a_model_without_published_figures_shows_its_own_alone(args: Config) -> None:
    assert "arXiv" not in report.page_of(Run.of(args), None)


@pytest.mark.parametrize("content", ['{"Cars": 0.', "[1, 2]", "\x00\x01"])
def test_a_damaged_file_is_left_out(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = Config(results=str(tmp_path))
    Run.of(args).results.mkdir(parents=True)
    (Run.of(args).results / "linear_negations.json").write_text(content)
    (Run.of(args).results / "linear_ft_accuracies.json").write_text("{}")
    for _ in range(2):  # also where there is a page, which may have an explorer to keep
        page = report.write_report(Run.of(args)).read_text(encoding="utf-8")
        assert "Provenance" in page and "Task negation" not in page
        assert "linear_negations.json is left out: " in caplog.text


NAMES = ["zeroshot_accuracies", "ft_accuracies", "linear_additions", "posthoc_negations"]


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_results_never_stop_a_page_or_a_summary(
    data: st.DataObject, tmp_path: Path
) -> None:
    args = Config(results=str(tmp_path))
    folder = Run.of(args).results
    folder.mkdir(parents=True, exist_ok=True)
    for file in (COMMITTED / "ViT-Nano-8").glob("*.json"):
        shutil.copy(file, folder)
    for name in data.draw(st.sets(st.sampled_from(NAMES), min_size=1)):
        content = (COMMITTED / "ViT-Nano-8" / f"{name}.json").read_bytes()
        (folder / f"{name}.json").write_bytes(data.draw(damaged(content)))
    page = report.write_report(Run.of(args)).read_text(encoding="utf-8")
    assert "Provenance" in page and page.rstrip().endswith("</html>")
    summary, text = write_summary([Run.of(args)])
    assert text.count("**") == 6
    figure = plain(_overview, Run.of(args), summary)
    pyplot.close(figure)


def test_what_is_damaged_is_a_dash_and_the_rest_stays(tmp_path: Path) -> None:
    args = Config(results=str(tmp_path), tasks=["MNIST", "Signs"])
    Run.of(args).results.mkdir(parents=True)
    content = {"MNIST": "0.9", "Signs": 0.5, "provenance": {"argv": ["a\udcff<b>"], "seed": 0}}
    accuracies_path(Run.of(args), "linear").write_text(json.dumps(content))
    page = report.write_report(Run.of(args)).read_text(encoding="utf-8")
    assert rows_of(page, "Single-task accuracy")["linear"] == ["50.0", "50.0"]
    assert "a\\udcff&lt;b&gt;" in page  # what is no UTF-8 is spelt out
    summary, text = write_summary([Run.of(args)])
    assert summary["single"]["linear"]["Signs"]["values"] == [0.5]
    assert summary["single"]["linear"]["mean"] == {"mean": None, "std": None, "values": [None]}
    assert "| linear    |     - |  50.0 |    - |" in text


def test_presets_are_those_of_sound_results(tmp_path: Path) -> None:
    args = Config(results=str(tmp_path))
    Run.of(args).results.mkdir(parents=True)
    arithmetic_path(Run.of(args), "linear", "additions").write_text('{"coefficient": "0.3"}')
    negations = '{"Emoji": {"coefficient": null}, "MNIST": {"coefficient": 0.5}}'
    arithmetic_path(Run.of(args), "linear", "negations").write_text(negations)
    presets = explorer.presets_of(Run.of(args), "linear")
    assert presets["Forget MNIST (0.5)"] == {"MNIST": -0.5}
    assert not any(name.startswith(("Best sum", "Forget Emoji")) for name in presets)


@pytest.mark.parametrize("name", ["report.html", "figures/single.png"])
def test_what_a_page_is_made_of_may_be_damaged(name: str, tmp_path: Path) -> None:
    args = Config(results=str(tmp_path))
    broken = Run.of(args).results / name
    if name == "report.html":
        broken.parent.mkdir(parents=True)
        broken.write_bytes(b"\xff\xfe<!-- tangent")
    else:
        broken.mkdir(parents=True)  # no picture at all
    assert "Provenance" in report.write_report(Run.of(args)).read_text(encoding="utf-8")


def test_names_are_escaped(tmp_path: Path) -> None:
    args = Config(model="ViT-Nano-8", results=str(tmp_path))
    folder = Run.of(args).results
    folder.mkdir(parents=True)
    origin = {"argv": ["<script>alert(1)</script>"], "commit": None}
    (folder / "zeroshot_accuracies.json").write_text(json.dumps({"provenance": origin}))
    page = report.page_of(Run.of(args), None)
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


def test_the_explorer_stays_while_it_is_true(args: Config, words: list[str]) -> None:
    own = explorer.explore(Run.of(args), "linear")
    path = report.write_report(Run.of(args), own)
    assert own in path.read_text(encoding="utf-8")
    assert eval_single_task.main(["--finetuning-mode=standard", *words]) == 0
    assert own in path.read_text(encoding="utf-8")  # nothing that it shows has changed
    file = accuracies_path(Run.of(args), "linear")
    changed = load_results(file)
    changed["Emoji"] /= 2
    file.write_text(json.dumps(changed))
    page = report.write_report(Run.of(args)).read_text(encoding="utf-8")
    assert "explorer-data" not in page and "analyze.py report" in page


def test_a_sample_where_not_all_fits(args: Config) -> None:
    args.explorer_megabytes = 0.1
    names = [f"{name}{end}" for end in ("Val", "") for name in (*TASKS, "Shapes")]
    count = explorer.sample_size(Run.of(args), names, 2)
    assert count is not None and 5 < count < 40
    args.explorer_megabytes = 15
    assert explorer.sample_size(Run.of(args), names, 2) is None
    args.sample = 9
    assert explorer.sample_size(Run.of(args), names, 2) == 9


def test_the_sample_is_the_largest_that_fits(args: Config) -> None:
    args.explorer_megabytes = 0.1
    page = explorer.explore(Run.of(args), "linear")
    data = explorer.DATA.findall(page)[0]
    numbers = sum(
        len(split[kind]) for split in json.loads(data)["splits"] for kind in explorer.KINDS
        if split[kind] is not None
    )  # fmt: skip
    count = max(split["images"] for split in json.loads(data)["splits"])
    assert 0.1e6 * (1 - 2 / count) < numbers <= 0.1e6 + 6 * 3 * 4


def test_a_sampled_explorer_says_how_many_images_its_splits_have(args: Config) -> None:
    args.explorer_megabytes = 0.1
    run = Run.of(args)
    page = explorer.explore(run, "linear")
    for split in json.loads(explorer.DATA.findall(page)[0])["splits"]:
        assert split["images"] < split["of"] == len(run.data.dataset(split["name"]).test)


def test_an_evaluation_of_the_same_sample_agrees(args: Config, words: list[str]) -> None:
    args.explorer_megabytes = 0.1
    page = explorer.explore(Run.of(args), "linear")
    count = max(split["images"] for split in json.loads(explorer.DATA.findall(page)[0])["splits"])
    argv = ["--finetuning-mode=linear", f"--sample={count}", *words]
    assert eval_single_task.main(argv) == 0
    args.sample = count
    found = load_results(accuracies_path(Run.of(args), "linear"))
    for task in TASKS:
        shown = explorer.accuracies(page, {task: 1.0})
        assert (shown[task], shown[f"{task}Val"]) == (found[task], found[f"{task}Val"])


# --- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as found:
        yield found


@pytest.mark.parametrize("mode", ["linear", "posthoc"])
def test_the_page_of_a_run(browser: Any, args: Config, words: list[str], mode: str) -> None:
    assert analyze.main(["report", f"--finetuning-mode={mode}", *words]) == 0
    edits = Edits(Run.of(args), mode, TASKS)
    negated = load_results(arithmetic_path(Run.of(args), mode, "negations"))["Emoji"]["coefficient"]
    added = float(load_results(arithmetic_path(Run.of(args), mode, "additions"))["coefficient"])
    presets = {
        "Zero-shot": {},
        "Sum of all": dict.fromkeys(TASKS, 1.0),
        f"Best sum on validation ({added:g})": dict.fromkeys(TASKS, added),
        "Only FashionMNIST": {"FashionMNIST": 1.0},
        f"Forget Emoji ({float(negated):g})": {"Emoji": -float(negated)},
    }
    with opened(browser, report.report_path(Run.of(args))) as page:
        for split, end in (("validation", "Val"), ("test", "")):
            page.get_by_role("radio", name=split).check()
            names = [f"{name}{end}" for name in (*TASKS, "Shapes")]
            for preset, point in presets.items():
                page.get_by_label("Preset").select_option(preset)
                state = page.evaluate("window.tangentExplorer.state()")
                expected = {name: edits.accuracies(name, [point])[0] for name in names}
                assert {name: one["accuracy"] for name, one in state.items()} == expected
        single = load_results(accuracies_path(Run.of(args), mode))
        page.get_by_label("Preset").select_option("Only Emoji")
        state = page.evaluate("window.tangentExplorer.state()")
        assert state["Emoji"]["accuracy"] == single["Emoji"]
        assert state["Emoji"]["normalised"] == 1


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone_and_a_desk(browser: Any, args: Config, width: int) -> None:
    report.write_report(Run.of(args), explorer.explore(Run.of(args), "linear"))
    size = {"width": width, "height": 740}
    with opened(browser, report.report_path(Run.of(args)), viewport=size) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".tx-results").evaluate("i => i.scrollWidth <= i.clientWidth")
        for part in ("#explorer-rows tr", ".tx-slider"):
            boxes = page.locator(part).evaluate_all(
                "all => all.map(i => i.getBoundingClientRect().toJSON())"
            )
            assert all(box["height"] < 56 and box["right"] <= width for box in boxes), boxes
        images = page.locator("figure img").evaluate_all("all => all.map(i => i.alt.length)")
        assert all(images)


COMMITTED = Path(__file__).resolve().parent.parent.parent / "results" / "embedded"


def test_the_committed_page_agrees_with_the_committed_results() -> None:
    folder = COMMITTED / "ViT-Nano-8_seed3"
    page = (folder / "report.html").read_text(encoding="utf-8")
    single = load_results(folder / "linear_ft_accuracies.json")
    added = load_results(folder / "linear_additions.json")
    tasks = [name for name in single if f"{name}Val" in single]
    assert len(tasks) == 8
    total = explorer.accuracies(page, dict.fromkeys(tasks, float(added["coefficient"])))
    for task in tasks:
        alone = explorer.accuracies(page, {task: 1.0})
        assert (alone[task], alone[f"{task}Val"]) == (single[task], single[f"{task}Val"])
        assert total[task] == added["test"][f"{task}:top1"]
    assert not re.search(r"/(tmp|home|root|work)/", page.split("explorer-data")[0])
