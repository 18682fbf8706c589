"""The summary over seeds: which runs it is of, its tables, and suites without a control set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import (
    collect,
    grids,
    latex_tables,
    overview_path,
    siblings,
    summarised,
    summary_path,
    tables,
    with_seed,
    write_summary,
)

COMMITTED = Path(__file__).resolve().parents[2] / "results"
RUN = Run.of(Config(results=str(COMMITTED)))


def test_siblings_are_the_seeds_with_results() -> None:
    for seed in range(4):
        assert [one.seed for one in siblings(with_seed(RUN, seed))] == [0, 1, 2, 3]
    sampled = RUN.with_(sample=500)
    assert [one.seed for one in siblings(sampled)] == [0]


@pytest.mark.parametrize(
    ("folder", "found"),
    [("_seed7", [0, 7]), ("_seed7_sample9", [0]), ("_seedy", [0]), ("-two_seed7", [0])],
)
def test_only_folders_of_the_same_model_are_siblings(
    folder: str, found: list[int], tmp_path: Path
) -> None:
    run = RUN.with_(results=str(tmp_path))
    path = run.results.with_name(f"{run.results.name}{folder}")
    path.mkdir(parents=True)
    (path / "zeroshot_accuracies.json").write_text("{}")
    assert [one.seed for one in siblings(run)] == found


@pytest.mark.parametrize("content", ["", "[]", '{"runs": 3}', '{"runs": [{"seed": "x"}, 4]}'])
def test_a_damaged_summary_is_of_no_runs(content: str, tmp_path: Path) -> None:
    run = RUN.with_(results=str(tmp_path))
    run.results.mkdir(parents=True)
    (run.results.parent / "summary.json").write_text(content)
    assert summarised(run) == []


def test_a_sample_has_a_summary_of_its_own(tmp_path: Path) -> None:
    run = RUN.with_(results=str(tmp_path))
    write_summary([run])
    whole = summary_path(run).read_bytes()
    sampled = run.with_(sample=9)
    write_summary([sampled])
    assert summary_path(run).read_bytes() == whole
    assert "on 9 examples of each test split" in summary_path(sampled, "md").read_text()
    names = {path.name for path in run.results.parent.iterdir()}
    assert names == {
        f"summary{end}"
        for end in (".json", ".md", ".tex", "_sample9.json", "_sample9.md", "_sample9.tex")
    }
    assert overview_path(run).name == "overview.png"
    assert overview_path(sampled).name == "overview_sample9.png"


def test_tables_are_those_of_the_committed_summary() -> None:
    runs = summarised(RUN)
    summary = collect(runs)
    committed = json.loads((COMMITTED / "embedded" / "summary.json").read_text())
    assert summary == {kind: committed.get(kind, {}) for kind in summary}
    text = tables(summary, runs[0].tasks, runs[0].control_set)
    assert text in (COMMITTED / "embedded" / "summary.md").read_text(encoding="utf-8")
    latex = latex_tables(summary, runs[0].tasks, runs[0].control_set)
    assert latex == (COMMITTED / "embedded" / "summary.tex").read_text(encoding="utf-8")
    assert latex.count("\\toprule") == 3


def test_modes_with_results_alone_have_rows(tmp_path: Path) -> None:
    shutil.copytree(RUN.results, tmp_path / "embedded" / "ViT-Nano-8")
    shutil.copytree(RUN.results, tmp_path / "embedded" / "ViT-Nano-8_seed1")
    run = RUN.with_(results=str(tmp_path))
    folder = run.results
    for left_out in ("posthoc_*", "linear_taujp_*", "*combined_*", "negations.json"):
        for path in folder.parent.glob(f"*/{left_out}"):
            path.unlink()
    for path in folder.parent.glob("*/*additions.json"):  # of before the sum at 1 was measured
        results = json.loads(path.read_text())
        del results["test_at_1"]
        path.write_text(json.dumps(results))
    for kind in ("ft_accuracies", "additions"):
        results = json.loads((folder / f"linear_{kind}.json").read_text())
        results["provenance"] |= {"mode": "linear+taujp"}
        results["test_at_1"] = {"avg_top1": 0.5, "avg_normalized_top1": 0.75}
        (folder / f"linear_taujp_{kind}.json").write_text(json.dumps(results))
    summary = collect([run, with_seed(run, 1)])
    assert list(summary["single"]) == ["none", "standard", "linear", "linear+taujp"]
    assert list(summary["addition"]) == ["standard", "linear", "linear+taujp"]
    assert list(summary["negation"]) == ["linear"]
    at_one = summary["addition"]["linear+taujp"]["mean at 1"]
    assert at_one == {"mean": None, "std": None, "values": [0.5, None]}
    titles = {title[:11]: (header, rows) for title, header, rows in grids(summary, RUN.tasks, None)}
    header, rows = titles["Task additi"]
    assert [row[0] for row in rows] == ["zero-shot", "standard", "linear", "linear, \u03c4Jp"]
    assert header[-1] == "mean at 1" and [row[-1] for row in rows] == ["", "-", "-", "-"]
    (one,) = [
        row
        for title, _, rows in grids(collect([run]), RUN.tasks, None)
        for row in rows
        if title.startswith("Task addition") and row[0] == "linear, \u03c4Jp"
    ]
    assert one[-1] == "50.0"
    assert "linear, $\\tau$Jp" in latex_tables(summary, RUN.tasks, None)


def test_without_a_control_set_there_is_no_table_of_negations() -> None:
    summary = collect([RUN])
    titles = [title for title, _, _ in grids(summary, RUN.tasks, None)]
    assert len(titles) == 2 and not any("negation" in title for title in titles)
