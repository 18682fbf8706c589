"""Claims of the papers as data, their verdicts, and the files that a paper's command writes."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tangent_arithmetic.analysis import disentanglement, kernel, tables
from tangent_arithmetic.analysis.tables import write_table
from tangent_arithmetic.commands import analyze, paper
from tangent_arithmetic.commands.stages import stages
from tangent_arithmetic.report.papers.claims import CLAIMS, FAILS, HOLDS, OPEN, Claim, verdict
from tangent_arithmetic.report.papers.evidence import Evidence
from tangent_arithmetic.report.papers.items import PAPERS
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.costs import Costs, of_clip
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import with_seed
from tangent_arithmetic.runtime.errors import MissingFileError, UsageError
from tangent_arithmetic.storage.reading import read_json

COMMITTED = Path(__file__).resolve().parents[2] / "results"
RUN = Run.of(Config(results=str(COMMITTED), save=str(COMMITTED / "none")))  # no checkpoints
MODES = ("standard", "posthoc", "linear")


# of an exact kernel of two tasks with as many examples
KERNEL = {"mode": "linear", "even": 0.5, "error": 0.0, "shift": 0.0}


class Known:
    """Evidence whose margin is a number, or that is missing."""

    def __init__(self, margin: float | str | None, seed: int = 0) -> None:
        self.margin, self.run = margin, RUN.with_(seed=seed)


def decided(*margins: float | str | None) -> Any:
    def measure(found: Any) -> tuple[float, ...]:
        if found.margin is None or isinstance(found.margin, str):
            raise LookupError(found.margin or "no such table")
        return 3.0, found.margin

    claim = Claim("arithmetic", "table 1", "text", "published", "{0} points", measure)
    return verdict(claim, [Known(margin, 3 + i) for i, margin in enumerate(margins)])  # type: ignore[misc]


def test_a_reason_of_one_seed_names_it() -> None:
    assert decided("15.6 % estimated", "15.2 % estimated").measured == "seed 3: 15.6 % estimated"
    assert decided("no rows", "no rows").measured == decided("no rows").measured == "no rows"
    assert decided("15.6 % estimated", 0.1).measured == "3.00 points"


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ((0.2, 0.3, 0.25), HOLDS),
        ((-0.2, -0.3, -0.25), FAILS),
        ((0.5, -0.3, 0.1), OPEN),
        ((0.1, 0.2, 0.3), OPEN),  # two standard errors above zero, but of three seeds
        ((0.1,), f"{HOLDS} (one seed)"),
        ((-0.1,), f"{FAILS} (one seed)"),
        ((None, None), OPEN),
        ((None, 0.1, 0.11), HOLDS),
        ((math.nan,), OPEN),
        ((math.nan, math.inf), OPEN),
        ((math.nan, 0.1, 0.11), HOLDS),
    ],
)
def test_verdicts_follow_from_the_spread(margins: tuple[float | None, ...], expected: str) -> None:
    found = decided(*margins)
    assert found.verdict == expected
    known = [margin for margin in margins if margin is not None and math.isfinite(margin)]
    assert found.margins == tuple(known) and found.seeds == len(known)
    assert found.measured == ("3.00 points" if found.seeds == 1 else "3.00 ± 0.00 points") or (
        found.seeds == 0 and found.measured in ("no such table", "not defined for these tasks")
    )


def test_claims_from_committed_results_are_decided() -> None:
    evidence = [Evidence(with_seed(RUN, seed), MODES) for seed in range(3)]
    by_text = {claim.text: verdict(claim, evidence) for claim in CLAIMS}
    linear = next(v for text, v in by_text.items() if "The sum of linear" in text)
    assert linear.seeds == 3 and len(linear.margins) == 3
    ours = [
        100 * (one.figure("addition", "linear", "absolute")
               - one.figure("addition", "standard", "absolute"))
        for one in evidence
    ]  # fmt: skip
    assert [100 * margin for margin in linear.margins] == pytest.approx(ours)
    assert linear.verdict == HOLDS
    assert {claim.paper for claim in CLAIMS} == set(PAPERS)


@pytest.mark.parametrize(
    ("text", "name", "rows", "margin"),
    [
        ("close to both", "subsets",
         {"num_vectors": [2], "own_coefficient": 1.0, "own_normalised": [0.97]}, 0.02),
        ("orthogonal", "similarity",
         {"mode1": ["standard"], "mode2": ["standard"], "task1": "A", "task2": "B",
          "cosine": [-0.3]}, -0.2),
        ("disentangled", "xi", {"mode": ["linear", "standard"], "xi": [0.1, 0.4]}, 0.3),
        ("localised", "kernel",
         {**KERNEL, "task": ["A", "A", "B", "B"], "own": [1.0, 0.0, 1.0, 0.0],
          "use": [0.8, 0.2, 0.6, 0.4]}, 0.7 - 0.75),
        ("localised", "kernel",
         {**KERNEL, "task": ["A", "B"], "own": [0.9, 0.8], "use": [1.0, 1.0]}, 0.1),
        ("localised", "kernel",
         {**KERNEL, "task": [*"ABCDEFGH"], "own": 0.6, "use": 1.0, "even": 0.125},
         0.6 - (0.125 + 0.875 / 2)),
    ],
)  # fmt: skip
def test_claims_measure_analysis_tables(
    text: str, name: str, rows: dict[str, Any], margin: float, tmp_path: Path
) -> None:
    run = RUN.with_(results=str(tmp_path))
    claim = next(claim for claim in CLAIMS if text in claim.text)
    assert verdict(claim, [Evidence(run, MODES)]).verdict == OPEN
    write_table(run, name, pd.DataFrame({"mode": "standard", **rows}), 1.0)
    assert verdict(claim, [Evidence(run, MODES)]).margins == pytest.approx((margin,))


def test_claims_are_open_where_they_are_not_defined(tmp_path: Path) -> None:
    """One task has no others that its eigenfunctions could be on, and no pairs."""
    run = RUN.with_(results=str(tmp_path))
    one = {**KERNEL, "task": ["A"], "own": [1.0], "use": [1.0]}
    estimated = {**KERNEL, "error": 0.08, "task": ["A", "B"], "own": 0.2, "use": 1.0}
    pair = {"mode1": "standard", "mode2": "standard", "task1": ["A"], "task2": "A", "cosine": 1.0}
    for text, name, rows, told in (
        ("localised", "kernel", one, "one task alone"),
        ("localised", "kernel", estimated, "20 % for an estimated kernel"),
        ("orthogonal", "similarity", pair, "not defined for these tasks"),
    ):
        write_table(run, name, pd.DataFrame(rows), 1.0)
        found = verdict(next(c for c in CLAIMS if text in c.text), [Evidence(run, MODES)] * 2)
        assert (found.verdict, found.margins) == (OPEN, ()) and told in found.measured


def test_without_a_gap_there_is_none_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = next(claim for claim in CLAIMS if "closes most of that gap" in claim.text)
    evidence = Evidence(RUN, MODES)
    assert verdict(claim, [evidence]).seeds == 1
    for posthoc in (0.9, 0.8):
        figures = {"standard": 0.8, "posthoc": posthoc, "linear": 0.85}
        monkeypatch.setattr(evidence, "figure", lambda _, mode, __, of=figures: of[mode])
        found = verdict(claim, [evidence])
        assert found.verdict == OPEN and found.measured.startswith("no gap between standard")


@pytest.mark.parametrize(
    ("linear", "standard", "margin"),
    [
        ([(0.6, 0.8), (0.2, 0.7)], [(0.6, 0.8), (0.4, 0.7)], 0.08),  # at 0.76
        ([(0.6, 0.8), (0.3, 0.8)], [(0.6, 0.8), (0.25, 0.7)], 0.3),  # 0.8 is kept by one alone
        ([(0.6, 0.8), (0.25, 0.7)], [(0.6, 0.8), (0.3, 0.8)], -0.3),
        ([(0.6, 0.8), (0.2, 0.77)], [(0.6, 0.8), (0.4, 0.79)], 0.4 - (0.6 - 0.4 / 3)),
        ([(0.6, 0.8), (0.2, 0.77), (0.5, 0.75)], [(0.6, 0.8), (0.4, 0.7), (0.3, 0.7)], 0.52 - 0.2),
    ],
)
def test_negations_are_compared_at_one_control_accuracy(
    linear: list[tuple[float, float]],
    standard: list[tuple[float, float]],
    margin: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim = next(claim for claim in CLAIMS if "linear task vector forgets" in claim.text)
    evidence = Evidence(RUN, MODES)
    swept = {
        mode: pd.DataFrame(rows, np.linspace(0, 1, len(rows)), ["target", "control"])
        for mode, rows in (("linear", linear), ("standard", standard))
    }
    monkeypatch.setattr(evidence, "negated", swept.__getitem__)
    assert verdict(claim, [evidence]).margins == pytest.approx((margin,), abs=1e-3)


def test_curves_of_negation_are_means_over_the_tasks_of_one_seed() -> None:
    run = with_seed(RUN, 1)
    found = Evidence(run, MODES).negated("linear")
    results = read_json(run.results / "linear_negations.json")
    assert len(found) == 21
    for key, name in (("target", "{}Val:top1"), ("control", "ShapesVal:top1")):
        values = [results[task]["val"]["0.5"][name.format(task)] for task in run.tasks]
        assert found[key][0.5] == pytest.approx(np.mean(values))
    with pytest.raises(LookupError, match="no negation of linear"):
        Evidence(run, ["standard"]).negated("linear")


def test_items_are_made_of_tables_that_exist() -> None:
    tables = {name for parts in analyze.ANALYSES.values() for name, _, _ in parts}
    for one in PAPERS.values():
        assert set(one.analyses) <= set(analyze.ANALYSES)
        for item in one.items:
            special = (paper.SINGLE, paper.ADDITION, paper.NEGATION, paper.PAIRS)
            assert item.why_not if item.made_of is None else item.made_of in {*tables, *special}
        stems = [item.stem for item in one.items]
        assert len(set(stems)) == len(stems)


def copied(folder: Path) -> list[Run]:
    """Runs of two seeds with the committed results in a folder."""
    for seed in (0, 1):
        source = with_seed(RUN, seed).results
        target = folder / source.relative_to(COMMITTED)
        target.mkdir(parents=True)
        for path in source.glob("*.json"):
            (target / path.name).write_bytes(path.read_bytes())
    return [with_seed(RUN.with_(results=str(folder)), seed) for seed in (0, 1)]


def test_a_paper_is_written_from_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = copied(tmp_path)
    for run, value in zip(runs, (0.2, 0.4), strict=True):
        row = {"mode": "linear", "task1": "A", "task2": "B", "xi": value, "low": 0.1, "high": 0.5}
        write_table(run, "xi", pd.DataFrame([{**row, "points": 6}]), 1.0)
    drawn, draw_xi = list[dict[str, float]](), disentanglement.draw_xi

    def spied(table: pd.DataFrame, run: Run) -> Any:
        drawn.extend(table[["xi", "xi std"]].to_dict("records"))
        return draw_xi(table, run)

    monkeypatch.setitem(analyze.ANALYSES, "disentanglement", [("xi", disentanglement.xi, spied)])
    folder = paper.write(PAPERS["tangent"], runs, MODES)
    assert folder == tmp_path / "embedded/papers/ViT-Nano-8/tangent"
    names = {path.name for path in folder.iterdir()}
    assert {"table_1.tex", "table_2.md", "figure_3_xi.pdf", "claims.tex", "paper.tex"} <= names
    assert drawn == [{"xi": pytest.approx(0.3), "xi std": pytest.approx(0.02**0.5)}]
    table = pd.read_csv(folder / "figure_3_xi.csv")
    assert table["xi"][0] == pytest.approx(0.3) and table["xi std"][0] == pytest.approx(0.02**0.5)
    assert not {"low", "high"} & set(table)  # of intervals over the images of one seed
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "seeds 0, 1" in text and "not here: no table at" in text and "| table 1 †" in text
    errors = "Binomial standard error of the images, at most: "
    assert f"{errors}2.6 % on a task, 0.9 % on the mean of the tasks, 2 % on Shapes, " in text
    assert f"{errors}2.6 \\% on a task" in (folder / "paper.tex").read_text()
    sizes = [
        [len(RUN.data.dataset(t).test) for t in pair] for pair in disentanglement.pairs_of(RUN)
    ]
    largest = max(math.sqrt(sum(0.25 / size for size in pair)) for pair in sizes)
    own = f"{errors}{largest:.2g} on a disentanglement error."
    assert own in (folder / "figure_3_xi.svg").read_text(encoding="utf-8")
    claims = read_json(folder / "claims.json")["claims"]
    assert {claim["paper"] for claim in claims} == {"tangent"}
    assert all(claim["verdict"].startswith((HOLDS, FAILS, OPEN)) for claim in claims)
    written = {f"figure_3_xi.{ending}" for ending in ("csv", "tex", "pdf", "svg")}
    assert r"\input{table_1}" in (folder / "paper.tex").read_text() and written <= names
    (folder / "table_1_of_a_reader.tex").touch()
    monkeypatch.setattr(tables, "LONGEST", 0)
    paper.write(PAPERS["tangent"], [run.with_(style="paper") for run in runs], MODES)
    assert (folder / "paper/figure_3_xi.pdf").is_file()
    assert "(paper/figure_3_xi.svg)" in (folder / "README.md").read_text(encoding="utf-8")
    paper.write(PAPERS["tangent"], runs, MODES)
    assert not list((folder / "paper").iterdir())
    left = {path.name for path in folder.iterdir()}
    assert written & left == written - {"figure_3_xi.tex"}
    inputs = (folder / "paper.tex").read_text()
    assert r"\includegraphics{figure_3_xi.pdf}" in inputs and r"\input{claims}" in inputs
    assert r"\input{figure_3_xi}" not in inputs and "reader" not in inputs
    other = [run.with_(grid_points=9) for run in runs]
    caplog.clear()
    paper.write(PAPERS["tangent"], other, MODES)
    assert "seed 1 is left out" in caplog.text and "--grid-points=9" in caplog.text
    assert not written & {path.name for path in folder.iterdir()}
    assert "made with another --grid-points, as" in (folder / "README.md").read_text("utf-8")
    with pytest.raises(UsageError, match=r"xi\.csv was .* disentanglement .*--grid-points=9"):
        Evidence(other[0], MODES).table("xi")
    with pytest.raises(MissingFileError, match=r"analyze\.py disentanglement"):
        Evidence(RUN.with_(results=str(tmp_path), seed=2), MODES).table("xi")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_a_papers_document_is_set_within_its_margins(tmp_path: Path) -> None:
    runs = copied(tmp_path)
    for run in runs:
        row = {"classes": 9, **dict.fromkeys(("zeroshot", *MODES), 0.5)}
        row |= dict.fromkeys(("advantage_posthoc", "advantage_linear"), 0.1)
        rows = pd.DataFrame([{"task": f"task_{i} <a|b>", **row} for i in range(8)])
        write_table(run, "single", rows, 1.0)
    folder = paper.write(PAPERS["tangent"], runs, MODES)
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(words, cwd=folder, capture_output=True, check=False)
    log = (folder / "paper.log").read_text(encoding="latin-1")
    assert done.returncode == 0 and "Output written on paper.pdf" in log, log[-2000:]
    assert "Overfull" not in log and "Missing character" not in log
    text = (folder / "paper.tex").read_text(encoding="utf-8")
    for place, what in (("Table 1 $\\dagger$", "task addition. ViT-Nano-8, suite embedded, seeds"),
                        ("Figure 2 $\\dagger$", "the non-linear advantage. ViT-Nano-8"),
                        ("Figure 2 $\\dagger$", "the numbers of the figure.")):  # fmt: skip
        assert f"\\caption*{{{place}: {what}" in text
    assert "advantage over post-hoc, \\% " in (folder / "figure_2.tex").read_text()
    assert "10.0 $\\pm$ 0.0" in (folder / "figure_2.tex").read_text()


def test_captions_are_of_the_images_of_their_table(tmp_path: Path) -> None:
    """And bounds of the values that are drawn."""
    run = RUN.with_(results=str(tmp_path), sample=100, kernel_images=32)
    assert kernel.sampled(run).config.sample == 32

    def told(name: str, run: Run = run) -> str:
        return " ".join(paper.caption(run, [run], name))

    assert told("kernel").endswith("at most 32 examples of each split, seed 0.")
    assert "at most 128 examples of each split" in told("ensembles", run.with_(sample=None))
    assert "at most: 4.4 % on a task" in told("ensembles", run.with_(sample=None))
    assert told("subsets").endswith(
        "100 examples of each split, seed 0. Binomial standard error of the images, at most: 5 % "
        "on a task, 1.8 % on the mean of the tasks, 5 % on Shapes; normalised accuracies and "
        "differences have larger ones."
    )
    assert told("xi").endswith("at most: 0.071 on a disentanglement error.")
    pair = run.with_(pairs=["Digits+MNIST"], sample=50)
    assert told("disentanglement", pair).endswith("at most: 0.1 on a disentanglement error.")
    few = run.with_(analogies=["MNIST+Letters-Signs=Digits"], sample=50)
    assert told("analogies", few).endswith("at most: 7.1 % on a target of analogies.")
    assert "Binomial" not in told("similarity")


def test_a_paper_has_no_results_of_other_modes(tmp_path: Path) -> None:
    """Those that lie there may be of other settings."""
    run = RUN.with_(results=str(tmp_path))
    run.results.mkdir(parents=True)
    for path in RUN.results.glob("*_accuracies.json"):
        (run.results / path.name).write_bytes(path.read_bytes())
    (run.results / "ft_accuracies.json").write_bytes(
        (RUN.results / "ft_accuracies.json").read_bytes()
    )
    local = {"mode": "linear", "task": ["A", "B"], "function": 1, "eigenvalue": 1.0, "own": 0.9}
    write_table(run, "kernel", pd.DataFrame({**local, "use": 1.0, "even": 0.5, "error": 0.0}), 1.0)
    folder = paper.write(PAPERS["tangent"], [run], ["standard"])
    labels = [
        line.split("|")[1].strip() for line in (folder / "figure_5.md").read_text().splitlines()
    ]
    assert labels[2:] == ["zero-shot", "standard"]
    assert not list(folder.glob("section_6*"))
    assert "not here: is of linear models" in (folder / "README.md").read_text(encoding="utf-8")
    claims = {one["text"]: one for one in read_json(folder / "claims.json")["claims"]}
    assert {one["verdict"] for one in claims.values()} == {OPEN}


def test_a_paper_on_one_task_has_no_pairs(tmp_path: Path) -> None:
    run = RUN.with_(results=str(tmp_path), tasks=["MNIST"], sample=48)
    row = {"mode": "standard", "num_vectors": 1, "tasks": "MNIST", "coefficient": 1.0}
    row |= {"absolute": 0.9, "normalised": 1.0, "own_coefficient": 1.0}
    one = pd.DataFrame([{**row, "own_absolute": 0.9, "own_normalised": 1.0}])
    write_table(run, "subsets", one, 1.0)
    folder = paper.write(PAPERS["arithmetic"], [run], ["standard"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "not here: nothing of standard on MNIST" in text and "claims.json" not in text
    assert "not here: no analogies of MNIST" in text and not list(folder.glob("figure_2*"))
    tangent = paper.write(PAPERS["tangent"], [run], ["standard"]) / "README.md"
    assert tangent.read_text(encoding="utf-8").count("not here: compares tasks in pairs") == 2
    assert "ViT-Nano-8, suite embedded, 48 examples of each split, seed 0." in text
    assert "48 examples of each split" in (folder / "figure_3.svg").read_text(encoding="utf-8")
    assert read_json(folder / "claims.json")["sample"] == 48


@pytest.mark.parametrize(
    ("name", "modes", "left"),
    [
        ("arithmetic", ["linear"], {"few"}),
        ("arithmetic", ["standard"], set()),
        ("tangent", ["linear"], {"single"}),
        ("tangent", ["standard"], {"single", "kernel"}),
        ("tangent", ["standard", "posthoc"], set()),
    ],
)
def test_analyses_that_lack_their_modes_are_left_out(
    name: str, modes: list[str], left: set[str]
) -> None:
    made = {
        one.name.removeprefix("analysis ") for one in paper.further(PAPERS[name], RUN, [], modes)
    }
    assert set(PAPERS[name].analyses) - made == left
    assert ("gradient ascent" in made) == ("standard" in modes)


def test_analyses_on_data_sets_beside_the_tasks() -> None:
    run = RUN.with_(
        tasks=["MNIST", "Letters"], analogies=["MNIST+Letters-Digits=StreetDigits!Signs"]
    )
    more = ("Digits", "StreetDigits", "Signs")
    both = PAPERS["arithmetic"]
    found = {one.name: one for one in paper.further(both, run, [], ["standard"])}
    assert tuple(found["standard fine-tuning on further data sets"].parts) == more
    assert (found["analysis few"].sets, found["analysis subsets"].sets) == (more, ())
    assert paper.data_sets(both, run, ["standard"]) == ["MNIST", "Letters", "Shapes", *more]
    other = RUN.with_(tasks=[*reversed(RUN.tasks)])
    assert paper.has_analogies(other) and not paper.has_analogies(RUN.with_(tasks=["MNIST"]))
    pair = RUN.with_(tasks=["MNIST"], pairs=["MNIST+Signs"])
    found = {one.name: one for one in paper.further(PAPERS["tangent"], pair, [], ["linear"])}
    assert list(found["linear fine-tuning on further data sets"].parts) == ["Signs"]
    alone = paper.further(PAPERS["tangent"], RUN.with_(tasks=["MNIST"]), [], ["linear"])
    assert "analysis disentanglement" not in {one.name for one in alone}


def test_the_plan_of_a_paper(tmp_path: Path) -> None:
    both = PAPERS["arithmetic"]
    run = RUN.with_(results=str(tmp_path), save=str(tmp_path / "save"))
    more = paper.further(both, run, ["--lr=1"], ["standard"])
    names = [stage.name for stage in more]
    assert names[:2] == ["gradient ascent", "standard fine-tuning on further data sets"]
    assert list(more[1].parts) == ["Digits", "StreetLetters"]
    assert more[2].argv == [both.analyses[0], "--modes=standard", "--lr=1"]
    assert names[2:] == [f"analysis {name}" for name in both.analyses]
    work = [*stages(run, [], ["standard"]), *more]
    told = paper.plan(both, [run], [work], paper.data_sets(both, run, ["standard"]))
    assert "needs the data sets Emoji" in told and "on two cores" in told
    assert "Shapes, Digits, StreetLetters" in told and "each split" not in told
    part = run.with_(sample=20)
    less = [*stages(part, [], ["standard"]), *paper.further(both, part, [], ["standard"])]
    assert "20 examples of each split" in paper.plan(both, [part], [less], [])
    costs = [sum(one.cost.cost for one in some if one.output) for some in (less, work)]
    assert costs[0] < 0.2 * costs[1]
    trained = [sum(one.cost.cost for one in some if not one.output) for some in (less, work)]
    assert trained[0] == trained[1]
    clip = Run.of(Config(suite="clip8", model="ViT-L-14", world_size=4, results=str(tmp_path)))
    few = [stage.name for stage in paper.further(both, clip, [], ["standard"])]
    assert not any("analogies" in name for name in few)
    kernel = "analysis kernel"
    for modes in (["standard"], ["standard", "linear"]):
        names = [stage.name for stage in paper.further(PAPERS["tangent"], run, [], modes)]
        assert (kernel in names) == ("linear" in modes)
    needed = paper.data_sets(both, clip, ["standard"])
    told = paper.plan(both, [clip], [stages(clip, [], ["standard"])], needed)
    assert "Cars" in told and "4 GPUs" in told and "prepare-data --suite=clip8" in told
    step = Costs(8, 21).training("standard")
    one, four = (of_clip(step, "ViT-B-32", gpus) for gpus in (1, 4))
    assert one is not None and four is not None and one == pytest.approx(4 * four)
    assert of_clip(step, "RN50") is None
