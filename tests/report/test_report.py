"""The report page of a run: rebuilt after each evaluation, complete, and read in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot

from src.eval import eval_single_dataset
from tangent_arithmetic.analysis import fronts
from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.analysis.figures import overview
from tangent_arithmetic.arithmetic.fronts import SMALLEST_RIDGE
from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy
from tangent_arithmetic.arithmetic.solving.solver import Objective
from tangent_arithmetic.commands import analyze, evaluate
from tangent_arithmetic.report import explorer
from tangent_arithmetic.report import page as report
from tangent_arithmetic.report.packing import KINDS
from tangent_arithmetic.report.sizes import sample_size
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.modes import MODES
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path, load_results
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import write_summary
from tests.browser import opened
from tests.run.test_results_schema import damaged
from tests.small_suite import TASKS

COMMITTED = Path(__file__).resolve().parent.parent.parent / "results" / "embedded"


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    """A run without results, with their folder."""
    run = Run.of(Config(results=str(tmp_path)))
    run.results.mkdir(parents=True)
    return run


def written(run: Run) -> str:
    """The page of a run."""
    return report.write_report(run).read_text(encoding="utf-8")


def rows_of(page: str, title: str) -> dict[str, list[str]]:
    """The rows of a table, by label."""
    table = page[page.index(f"<h2>{title}") :]
    table = table[: table.index("</table>")]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table)
    return {label: re.findall("<td[^>]*>(.*?)</td>", cells) for label, cells in rows}


def data_of(page: str) -> Any:
    """The explorer's data."""
    return json.loads(explorer.DATA.findall(page)[0])


def test_each_evaluation_leaves_a_page(run: Run) -> None:
    page = report.report_path(run).read_text(encoding="utf-8")
    single = rows_of(page, "Single-task accuracy")
    assert list(single) == ["zero-shot", "standard", "linear", "post-hoc"]
    for mode, label in (("none", "zero-shot"), ("linear", "linear")):
        values = [load_results(accuracies_path(run, mode))[task] for task in TASKS]
        assert single[label] == [f"{100 * v:.1f}" for v in (*values, sum(values) / 2)]
    addition = load_results(arithmetic_path(run, "posthoc", "additions"))
    means = ("avg_top1", "avg_normalized_top1")
    keys = [*(f"{task}:top1" for task in TASKS), *means]
    row = rows_of(page, "Task addition")["post-hoc, Emoji+FashionMNIST"]
    assert row[:-2] == [f"{100 * addition['test'][key]:.1f}" for key in keys]
    assert row[-2] == f"{float(addition['coefficient']):g}"
    assert row[-1] == f"{100 * addition['test_at_1']['avg_top1']:.1f}"
    negated = load_results(arithmetic_path(run, "standard", "negations"))
    kept = sum(negated[task]["test_control"] for task in TASKS) / 2
    assert rows_of(page, "Task negation")["standard"][-3] == f"{100 * kept:.1f}"
    for name in ("linear_negations.json", "zeroshot_accuracies.json"):
        assert f'<th scope="row">{name}</th>' in page
    assert "python src/analyze.py report" in page and "arXiv" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_a_composed_mode_has_rows_and_an_explorer(composed: Run) -> None:
    mode, label = "linear+taujp", "linear, \u03c4Jp"
    explored = explorer.explore(composed, mode)
    page = report.write_report(composed, explored).read_text(encoding="utf-8")
    single = rows_of(page, "Single-task accuracy")
    assert list(single) == ["zero-shot", "standard", "linear", "post-hoc", label]
    found = load_results(accuracies_path(composed, mode))
    assert single[label][:-1] == [f"{100 * found[task]:.1f}" for task in TASKS]
    added = load_results(arithmetic_path(composed, mode, "additions"))
    assert rows_of(page, "Task addition")[f"{label}, Emoji+FashionMNIST"][-1] == (
        f"{100 * added['test_at_1']['avg_top1']:.1f}"
    )
    assert label in rows_of(page, "Task negation")
    assert explored in page and "The linear (\u03c4Jp) model at" in page
    assert f"--tx-own: {MODES[mode].colour}" in page and "linear_taujp_finetuned" in page
    assert "<dt>mean at 1</dt>" in page and "after the comma" in page
    shown = explorer.accuracies(page, dict.fromkeys(TASKS, 1.0))
    assert shown["Emoji"] == added["test_at_1"]["Emoji:top1"]
    assert explored in written(composed)  # kept, as its results are the same


def test_pages_without_new_results_have_no_new_columns(tmp_path: Path) -> None:
    run = Run.of(Config(results=str(tmp_path)))
    later = shutil.ignore_patterns("*taujp*", "*combined*", "report.html")
    shutil.copytree(COMMITTED / "ViT-Nano-8", run.results, ignore=later)
    for path in run.results.glob("*additions.json"):
        results = json.loads(path.read_text())
        kept = {k: v for k, v in results.items() if k not in ("test_at_1", "interference")}
        path.write_text(json.dumps(kept))
    page = report.page_of(run, None)
    assert list(rows_of(page, "Single-task accuracy"))[:4] == [
        *("zero-shot", "standard", "linear", "post-hoc")
    ]
    for new in ("mean at 1", "after the comma", "Interference"):
        assert new not in page


def test_a_results_folder_of_another_project_makes_a_page(tmp_path: Path) -> None:
    run = Run.of(Config(model="ViT-B-32", results=str(tmp_path)))
    run.results.mkdir(parents=True)
    (run.results / "zeroshot_accuracies.json").write_text(json.dumps({"Cars": 0.6, "DTD": 0.44}))
    added = {"test": {"Cars:top1": 0.7, "avg_top1": 0.65}, "val": {}, "coefficient": 0.3}
    (run.results / "additions.json").write_text(json.dumps(added))
    merged = {**added, "merge": {"label": "TIES"}, "coefficient": None}
    (run.results / "merging-ties.json").write_text(json.dumps(merged))
    page = written(run)
    single = rows_of(page, "Single-task accuracy")
    assert single["zero-shot"] == ["60.0", "44.0", "52.0"]
    assert single["zero-shot (aTLAS)"] == ["59.7", "44.0", "48.1"]
    addition = rows_of(page, "Task addition")
    assert addition["standard"] == ["70.0", "-", "65.0", "-", "0.3"]
    assert addition["standard (arXiv:2305.12827)"] == ["", "", "71.4 †", "76.5 †", ""]
    assert addition["standard (TAK)"] == ["", "", "73.5", "80.4", ""]
    assert rows_of(page, "Merging") == {"TIES": ["70.0", "-", "65.0", "-", "-"]}
    assert "† recalled, not read in a public text: unverified." in page
    assert "Task negation" not in page


@pytest.mark.parametrize("content", ['{"Cars": 0.', "[1, 2]", "\x00\x01"])
def test_a_damaged_file_is_left_out(
    content: str, empty: Run, caplog: pytest.LogCaptureFixture
) -> None:
    (empty.results / "linear_negations.json").write_text(content)
    (empty.results / "linear_ft_accuracies.json").write_text("{}")
    for _ in range(2):  # also with an existing page, which may contain an explorer
        page = written(empty)
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
    run = Run.of(Config(results=str(tmp_path)))
    run.results.mkdir(parents=True, exist_ok=True)
    for file in (COMMITTED / "ViT-Nano-8").glob("*.json"):
        shutil.copy(file, run.results)
    for name in data.draw(st.sets(st.sampled_from(NAMES), min_size=1)):
        content = (COMMITTED / "ViT-Nano-8" / f"{name}.json").read_bytes()
        (run.results / f"{name}.json").write_bytes(data.draw(damaged(content)))
    page = written(run)
    assert "Provenance" in page and page.rstrip().endswith("</html>")
    summary, text = write_summary([run])
    assert text.count("**") == 6
    with pytest.MonkeyPatch.context() as patch:  # writing the files takes most of the time
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        overview(run, summary, tmp_path / "overview.png")
    pyplot.close("all")


def test_invalid_values_are_dashes_and_the_rest_stays(empty: Run) -> None:
    run = empty.with_(tasks=["MNIST", "Signs"])
    content = {"MNIST": "0.9", "Signs": 0.5}
    origin = {"argv": ["a\udcff<script>alert(1)</script>"], "seed": 0, "commit": None}
    accuracies_path(run, "linear").write_text(json.dumps({**content, "provenance": origin}))
    page = written(run)
    assert rows_of(page, "Single-task accuracy")["linear"] == ["50.0", "50.0"]
    assert "a\\udcff&lt;script&gt;alert(1)" in page and "<script>" not in page
    summary, text = write_summary([run])
    assert summary["single"]["linear"]["Signs"]["values"] == [0.5]
    assert summary["single"]["linear"]["mean"] == {"mean": None, "std": None, "values": [None]}
    assert "| linear |     - |  50.0 |    - |" in text and "\n| zero-shot" not in text


def test_presets_need_valid_results(empty: Run) -> None:
    arithmetic_path(empty, "linear", "additions").write_text('{"coefficient": "0.3"}')
    negations = '{"Emoji": {"coefficient": null}, "MNIST": {"coefficient": 0.5}}'
    arithmetic_path(empty, "linear", "negations").write_text(negations)
    presets = explorer.presets_of(empty, "linear")
    assert presets["Forget MNIST (0.5)"] == {"MNIST": -0.5}
    assert not any(name.startswith(("Best sum", "Exact", "Forget Emoji")) for name in presets)
    added = '{"coefficient": 0.3, "exact": {"coefficient": 0.28771}}'
    arithmetic_path(empty, "linear", "additions").write_text(added)
    presets = explorer.presets_of(empty, "linear")
    assert set(presets["Exact best sum on validation (0.2877)"].values()) == {0.28771}


def test_a_damaged_page_or_figure_does_not_stop_the_page(empty: Run) -> None:
    (empty.results / "report.html").write_bytes(b"\xff\xfe<!-- tangent")
    (empty.results / "figures" / "single.png").mkdir(parents=True)  # not a picture
    (empty.results / "figures" / "other.png").write_bytes(b"a picture")
    page = written(empty)
    assert "Provenance" in page
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["other"]


def test_the_explorer_is_kept_until_results_change(own: Run, words: list[str]) -> None:
    explored = explorer.explore(own, "linear")
    assert explored in report.write_report(own, explored).read_text(encoding="utf-8")
    assert evaluate.main(["--finetuning-mode=standard", *words]) == 0
    assert explored in report.report_path(own).read_text(encoding="utf-8")
    file = accuracies_path(own, "linear")
    changed = load_results(file)
    changed["Emoji"] /= 2
    file.write_text(json.dumps(changed))
    page = written(own)
    assert "explorer-data" not in page and "analyze.py report" in page


def test_an_explorer_that_does_not_fit_uses_the_largest_sample(own: Run, words: list[str]) -> None:
    names = [f"{name}{end}" for end in ("Val", "") for name in (*TASKS, "Shapes")]
    assert sample_size(own, names, 2) is None
    assert sample_size(own.with_(sample=9), names, 2) == 9

    def limited(megabytes: float) -> int | None:  # below the least value of the flag
        return sample_size(Run(replace(own.config, explorer_megabytes=megabytes)), names, 2)

    assert limited(1e-9) == 1
    count = limited(0.03)
    assert count is not None and 5 < count < 20
    sampled = own.with_(sample=count)
    page = explorer.explore(sampled, "linear")
    splits = data_of(page)["splits"]
    size = sum(
        len(split[kind]) for split in splits for kind in (*KINDS, "inner") if split.get(kind)
    )
    assert 0.03e6 * (1 - 2 / count) < size <= 0.03e6 + 6 * 3 * 4
    assert max(split["images"] for split in splits) == count
    for split in splits:
        assert split["images"] < split["of"] == len(own.data.dataset(split["name"]).test)
    # an evaluation of the same sample agrees
    assert evaluate.main(["--finetuning-mode=linear", f"--sample={count}", *words]) == 0
    results = load_results(accuracies_path(sampled, "linear"))
    for task in TASKS:
        shown = explorer.accuracies(page, {task: 1.0})
        assert (shown[task], shown[f"{task}Val"]) == (results[task], results[f"{task}Val"])


def test_a_sample_is_normalised_by_accuracies_on_the_same_images(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explorer, "sample_size", lambda *_: 7)  # the flag's least value fits all
    page = explorer.explore(run, "linear")
    singles, results = data_of(page)["singles"], load_results(accuracies_path(run, "linear"))
    assert singles.keys() == {f"{task}{end}" for task in TASKS for end in ("Val", "")}
    for task in TASKS:
        shown = explorer.accuracies(page, {task: 1.0})
        assert all(singles[name] == shown[name] for name in (task, f"{task}Val"))
    assert any(value != results[name] for name, value in singles.items())


# --- in a browser


@pytest.mark.parametrize("mode", ["linear", "posthoc"])
def test_the_page_agrees_with_python(
    browser: Any, own: Run, words: list[str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert analyze.main(["report", f"--finetuning-mode={mode}", *words]) == 0
    edits = Edits(own, mode, TASKS)
    negated = load_results(arithmetic_path(own, mode, "negations"))["Emoji"]["coefficient"]
    added = float(load_results(arithmetic_path(own, mode, "additions"))["coefficient"])
    presets = {
        "Zero-shot": {},
        "Sum of all": dict.fromkeys(TASKS, 1.0),
        f"Best sum on validation ({added:g})": dict.fromkeys(TASKS, added),
        "Only FashionMNIST": {"FashionMNIST": 1.0},
        f"Forget Emoji ({float(negated):g})": {"Emoji": -float(negated)},
    }
    with opened(browser, report.report_path(own)) as page:
        for split, end in (("validation", "Val"), ("test", "")):
            page.get_by_role("radio", name=split).check()
            names = [f"{name}{end}" for name in (*TASKS, "Shapes")]
            expected = {name: edits.accuracies(name, list(presets.values())) for name in names}
            for i, preset in enumerate(presets):
                page.get_by_label("Preset").select_option(preset)
                state = page.evaluate("window.tangentExplorer.state()")
                shown = {name: one["accuracy"] for name, one in state.items()}
                assert shown == {name: values[i] for name, values in expected.items()}
        single = load_results(accuracies_path(own, mode))
        page.get_by_label("Preset").select_option("Only Emoji")
        state = page.evaluate("window.tangentExplorer.state()")
        assert state["Emoji"]["accuracy"] == single["Emoji"]
        assert state["Emoji"]["normalised"] == 1
        page.evaluate("window.tangentExplorer.set('FashionMNIST', -0.35)")
        state = page.evaluate("window.tangentExplorer.state()")
        found: dict[str, Any] = {}
        monkeypatch.setenv("HOME", str(own.folder.parent))  # as the paths are shortened
        exec(page.evaluate("window.tangentExplorer.asPython()"), found)
    shown = eval_single_dataset(found["encoder"], "Emoji", own)["top1"]
    assert shown == state["Emoji"]["accuracy"]


def test_the_page_of_a_run_solves_for_weights(browser: Any, own: Run) -> None:
    report.write_report(own, explorer.explore(own, "linear"))
    edits, shares = Edits(own, "linear", TASKS), (0.25, 0.75)
    splits = [fronts.reduced(edits, f"{task}Val") for task in TASKS]
    with opened(browser, report.report_path(own)) as page:
        assert page.locator("#explorer-chooser").is_visible()
        weights = {split.name: share for split, share in zip(splits, shares, strict=True)}
        found = page.evaluate("w => window.tangentExplorer.solver.solve(w)", weights)
    terms = [Term(s, cross_entropy, share) for s, share in zip(splits, shares, strict=True)]
    objective = Objective(terms, np.full(len(TASKS), fronts.START), SMALLEST_RIDGE)
    value, gradient = objective.value_and_gradient(np.array(found["coefs"]))
    assert found["value"] == pytest.approx(value, rel=1e-5)
    assert np.linalg.norm(gradient) < 1e-4


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone_and_a_desk(browser: Any, own: Run, width: int) -> None:
    report.write_report(own, explorer.explore(own, "linear"))
    size = {"width": width, "height": 740}
    with opened(browser, report.report_path(own), viewport=size) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".tx-results").evaluate("i => i.scrollWidth <= i.clientWidth")
        for part in ("#explorer-rows tr", ".tx-slider"):
            boxes = page.locator(part).evaluate_all(
                "all => all.map(i => i.getBoundingClientRect().toJSON())"
            )
            assert all(box["height"] < 56 and box["right"] <= width for box in boxes), boxes
        images = page.locator("figure img").evaluate_all("all => all.map(i => i.alt.length)")
        assert all(images)


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
