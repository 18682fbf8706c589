from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
from PIL import Image

from tangent_arithmetic.analysis.tables import table_path, write_table
from tangent_arithmetic.commands import reproduce
from tangent_arithmetic.commands.paper import further
from tangent_arithmetic.data.registry import ImageDataset, SuiteData
from tangent_arithmetic.report.papers.items import PAPERS
from tangent_arithmetic.run.args import parse_arguments
from tangent_arithmetic.run.costs import Costs
from tangent_arithmetic.run.results import accuracies_path, arithmetic_path
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import spread, with_seed
from tangent_arithmetic.runtime.atomic import write_json
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.eta import Estimate, Step
from tangent_arithmetic.storage.checkpoints import save_tensors
from tests.small_suite import TASKS, flags, small_config, small_suite

ROOT = Path(__file__).resolve().parent.parent.parent
Capture = pytest.CaptureFixture[str]


def script(name: str) -> ModuleType:
    """A script, or the command of the package that it is a face of."""
    command = f"tangent_arithmetic.commands.{name}"
    if importlib.util.find_spec(command) is not None:
        return importlib.import_module(command)
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def several(folder: Path) -> list[str]:
    """Flags for runs of several seeds, each in a folder of its own."""
    return [flag for flag in flags(folder) if not flag.startswith("--save")]


def test_the_stages_of_a_run() -> None:
    run = Run.of(small_config(Path("x")))
    stages = reproduce.stages(run, ["--lr=1"])
    assert len(stages) == 16 and stages[0].argv == ["--finetuning-mode=none", "--lr=1"]
    assert [stage.name for stage in stages if stage.output is None] == [
        "standard fine-tuning",
        "linear fine-tuning",
    ]
    outputs = {stage.output for stage in stages if stage.output is not None}
    assert len(outputs) == 14 and accuracies_path(run, "posthoc") in outputs
    assert all(stage.cost.cost > 0 for stage in stages)
    training = next(stage for stage in stages if stage.name == "linear fine-tuning")
    assert list(training.parts) == list(TASKS) and len(training.steps) == len(TASKS)
    assert training.parts["Emoji"] == ["--train-dataset=Emoji"]
    assert sum(step.cost for step in training.steps) == pytest.approx(training.cost.cost)
    several = reproduce.stages(run.with_(world_size=2), [])  # processes start once for all tasks
    assert [list(stage.parts) for stage in several] == [[""]] * 16
    ahead = {stage.name: words for stage in several if (words := stage.parts[""])}
    assert ahead == {  # the page shows the first linear mode
        "linear single-task evaluation": ["--ahead=page"],
        "posthoc single-task evaluation": ["--ahead=sums"],
    }


def test_the_stages_of_chosen_modes() -> None:
    run = Run.of(small_config(Path("x")))
    modes = ["posthoc", "linear+taujp", "standard+delta"]
    names = [stage.name for stage in reproduce.stages(run, [], modes)]
    assert names[:4] == [
        "zero-shot evaluation",
        *("standard fine-tuning", "linear+taujp fine-tuning", "standard+delta fine-tuning"),
    ]
    assert len(names) == 4 + 3 * 4 + 1
    by_name = {stage.name: stage for stage in reproduce.stages(run, [], modes)}
    added = by_name["linear+taujp task addition"]
    assert added.argv == ["--finetuning-mode=linear+taujp"] and added.inputs == ["linear+taujp"]
    assert added.output == arithmetic_path(run, "linear+taujp", "additions")
    assert by_name["posthoc task negation"].inputs == ["standard"]
    assert by_name["zero-shot evaluation"].inputs == []
    costs = Costs(8, 21)
    assert costs.training("linear+taujp").kind == costs.training("linear").kind
    assert costs.training("linear+taujp").cost > 1.5 * costs.training("linear").cost


def checkpoint(run: Run, task: str, mode: str, value: float) -> None:
    save_tensors(run.finetuned_path(task, mode), {"w": torch.tensor([value])}, kind="other")


def test_ledgers_of_before_stay_valid(tmp_path: Path) -> None:
    run = Run.of(small_config(tmp_path))
    for task in TASKS:
        checkpoint(run, task, "standard", 1.0)
        checkpoint(run, task, "linear", 2.0)
    modes = ["standard", "linear", "linear+taujp"]
    stages = {stage.name: stage for stage in reproduce.stages(run, ["--lr=1"], modes)}
    stage = stages["linear task addition"]
    assert stage.output is not None
    stage.output.parent.mkdir(parents=True)
    stage.output.write_text("{}")
    ledger = reproduce.Ledger(run)
    before = ledger._entry(stage, ["standard", "linear"])  # as ledgers were written
    assert len(before["inputs"]) == 4
    write_json(ledger.path, {stage.name: before})
    assert ledger.is_done(stage)
    checkpoint(run, "Emoji", "linear+taujp", 3.0)  # another mode's is no reason to run again
    assert ledger.is_done(stage)
    checkpoint(run, "Emoji", "linear", 4.0)
    assert not ledger.is_done(stage)
    ledger.note(stage)
    assert ledger.is_done(stage)
    checkpoint(run, "Emoji", "standard", 5.0)  # not one of its own
    assert ledger.is_done(stage)
    checkpoint(run, "Emoji", "linear", 6.0)
    assert not ledger.is_done(stage)


@pytest.mark.parametrize(
    ("stage", "task", "mode", "again"),
    [
        ("analysis negation", "Emoji", "linear+taujp", True),
        ("analysis negation", "Emoji", "standard+ascent", True),
        ("analysis kernel", "Emoji", "standard+ascent", False),
        ("analysis kernel", "Emoji", "linear+taujp", True),
        ("analysis disentanglement", "Signs", "linear+taujp", True),
        ("analysis disentanglement", "MNIST", "linear+taujp", False),
        ("report page", "Emoji", "linear+taujp", True),
        ("report page", "Emoji", "linear", True),
    ],
)
def test_analyses_run_again_after_retraining(
    stage: str, task: str, mode: str, again: bool, tmp_path: Path
) -> None:
    run = Run.of(small_config(tmp_path)).with_(pairs=["Emoji+Signs"])
    modes = ["standard", "linear+taujp"]
    every = itertools.product((*TASKS, "Signs", "MNIST"), (*modes, "linear"))
    for value, (name, one) in enumerate(every):
        checkpoint(run, name, one, float(value))
    todo = [*reproduce.stages(run, [], modes), *further(PAPERS["tangent"], run, [], modes)]
    found = next(one for one in todo if one.name == stage)
    assert found.output is not None
    found.output.parent.mkdir(parents=True, exist_ok=True)
    found.output.write_text("{}")
    ledger = reproduce.Ledger(run)
    earlier = ledger._entry(replace(found, sets=()), ["standard", "linear"])
    write_json(ledger.path, {found.name: earlier})  # it does not tell of other modes
    assert not ledger.is_done(found)
    ledger.note(found)
    assert ledger.is_done(found)
    checkpoint(run, task, mode, -1.0)
    assert ledger.is_done(found) != again


def test_papers_leave_each_others_analyses_done(tmp_path: Path) -> None:
    """A table holds the rows of both, and a stage is done while those of its modes are there."""
    run = Run.of(small_config(tmp_path))
    for task, mode in itertools.product(TASKS, ("standard", "linear", "standard+ascent")):
        checkpoint(run, task, mode, float(len(mode)))
    todo = {
        name: next(
            stage
            for stage in further(PAPERS[name], run, ["--lr=1"], PAPERS[name].modes)
            if stage.name == "analysis negation"
        )
        for name in PAPERS
    }
    ledger = reproduce.Ledger(run)

    def write(name: str, run: Run = run) -> None:
        rows = {"mode": PAPERS[name].modes, "vector": "task", "task": "Emoji"}
        table = pd.DataFrame({**rows, "target": 1 / run.config.n_eval_points})
        write_table(run, "negation_random", table, 1.0)

    def work(name: str) -> None:
        write(name)
        ledger.note(todo[name])

    assert not any(map(ledger.is_done, todo.values()))
    work("arithmetic")
    assert [*map(ledger.is_done, todo.values())] == [True, False]
    work("tangent")
    assert all(map(ledger.is_done, todo.values()))
    work("arithmetic")
    assert all(map(ledger.is_done, todo.values()))
    assert todo["tangent"].output is not None
    assert len(pd.read_csv(todo["tangent"].output)) == 3
    write("arithmetic", run.with_(n_eval_points=9))
    assert not any(map(ledger.is_done, todo.values()))
    work("arithmetic")
    assert [*map(ledger.is_done, todo.values())] == [True, False]  # has lost its other rows
    work("tangent")
    checkpoint(run, "Emoji", "linear", 9.0)
    assert [*map(ledger.is_done, todo.values())] == [True, False]
    todo["tangent"].output.write_bytes(b"\xff")
    assert not any(map(ledger.is_done, todo.values()))


def test_standard_sweeps_cost_by_the_number_of_coefficients() -> None:
    few, many = Costs(8, 5), Costs(8, 21)
    for name in ("addition", "negation"):
        assert getattr(many, name)("standard").cost > 2 * getattr(few, name)("standard").cost
        assert getattr(many, name)("posthoc") == getattr(few, name)("linear")
    assert many.training("linear").cost > many.training("standard").cost


# measured: seconds of the stages of two whole runs on two cores that were busy with other work
MEASURED = {
    (2, 5): [15, 42, 73, 5, 15, 15, 11, 12, 17, 37, 33, 22, 20],
    (8, 21): [28, 126, 220, 17, 41, 40, 96, 36, 46, 194, 35, 32, 30],
}


@pytest.mark.parametrize("size", MEASURED)
def test_the_time_left_of_measured_runs_is_right_within_30_percent(size: tuple[int, int]) -> None:
    run = Run.of(parse_arguments([f"--n-eval-points={size[1]}"]))
    tasks = run.tasks[: size[0]]
    every = reproduce.stages(run.with_(tasks=tasks), [])
    todo = [stage for stage in every if "solved" not in stage.name]  # these runs had none
    seconds = [
        spent / len(stage.steps)
        for stage, spent in zip(todo, MEASURED[size], strict=True)
        for _ in stage.steps
    ]
    estimate = Estimate([step for stage in todo for step in stage.steps])
    for i, spent in enumerate(seconds):
        estimate.done(spent)
        if sum(seconds[: i + 1]) > sum(seconds) / 3 and (left := sum(seconds[i + 1 :])):
            slack = 0.3 * left + 0.02 * sum(seconds)  # the last seconds need no such care
            assert estimate.left() == pytest.approx(left, abs=slack), i


# stages that write one file each


@pytest.fixture
def worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The seeds and names of the stages that did their work."""
    names: list[str] = []

    def stages(run: Run, flags: list[str], modes: Sequence[str]) -> list[reproduce.Stage]:
        def stage(name: str, output: Path) -> reproduce.Stage:
            def work(argv: Sequence[str]) -> int:
                names.append(f"{run.seed} {name}")
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text("{}")
                return 0

            return reproduce.Stage(name, work, flags, output, Step("work", 50))

        adding = stage("addition", arithmetic_path(run, "standard", "additions"))
        return [stage("zero-shot evaluation", accuracies_path(run, "none")), adding]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "stages", stages)
    return names


def test_finished_stages_are_skipped_until_their_results_change(
    worked: list[str], tmp_path: Path, capsys: Capture
) -> None:
    argv = ["--seeds=2", *several(tmp_path)]
    everything = [f"{n} {name}" for n in (0, 1) for name in ("zero-shot evaluation", "addition")]
    assert reproduce.main(argv) == 0
    assert worked == everything
    assert "[seed 1: 2/2] addition (0.0 min so far" in capsys.readouterr().out
    worked.clear()
    assert reproduce.main(argv) == 0
    assert worked == []
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 4 and "Single-task accuracy" in out
    suite = tmp_path / "results" / "embedded"
    assert "seeds: 0, 1" in (suite / "summary.md").read_text()
    (suite / "ViT-Nano-8_seed1" / "zeroshot_accuracies.json").write_text("{} ")
    assert reproduce.main(argv) == 0
    assert worked == everything[2:3]


@pytest.mark.parametrize("damage", [None, b"", b"[]", b'{"zero-shot', b"\xff"])
def test_results_without_a_ledger_do_not_count_as_done(
    damage: bytes | None, worked: list[str], tmp_path: Path
) -> None:
    assert reproduce.main(several(tmp_path)) == 0
    ledger = tmp_path / "checkpoints" / "ViT-Nano-8" / "stages.json"
    ledger.unlink() if damage is None else ledger.write_bytes(damage)
    assert reproduce.main(several(tmp_path)) == 0
    assert len(worked) == 4


# all of it, for real


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the whole benchmark done, for two seeds."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        monkeypatch.chdir(folder)
        assert reproduce.main(["--seeds=2", *several(folder)]) == 0
        yield folder


@pytest.mark.slow
def test_every_file_of_the_design_is_there(root: Path) -> None:
    suffix = "+".join(TASKS)
    names = ["zeroshot_accuracies", "report"]
    for prefix in ("", "linear_", "posthoc_"):
        names += [f"{prefix}ft_accuracies", f"{prefix}additions-{suffix}", f"{prefix}negations"]
        names.append(f"{prefix}combined_task-layer_4shot_tasks{suffix}")
    suite = root / "results" / "embedded"
    for run in ("ViT-Nano-8", "ViT-Nano-8_seed1"):
        assert {path.stem for path in (suite / run).iterdir()} == set(names)
        page = (suite / run / "report.html").read_text(encoding="utf-8")
        assert "explorer-data" in page and "Task negation" in page
    assert (root / "checkpoints" / "ViT-Nano-8" / "EmojiVal" / "finetuned.safetensors").is_file()
    assert (root / "checkpoints_1" / "ViT-Nano-8" / "zeroshot.safetensors").is_file()
    with Image.open(suite / "figures" / "overview.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert picture.width > 1000 and colours is not None and len(colours) > 50


@pytest.mark.slow
def test_the_summary_is_over_seeds(root: Path) -> None:
    suite = root / "results" / "embedded"
    summary = json.loads((suite / "summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    for mode in ("standard", "linear", "posthoc"):
        for task in TASKS:
            name = "" if mode == "standard" else f"{mode}_"
            values = [
                json.loads((suite / run / f"{name}ft_accuracies.json").read_text())[task]
                for run in ("ViT-Nano-8", "ViT-Nano-8_seed1")
            ]
            figures = summary["single"][mode][task]
            assert figures["values"] == values
            assert figures["mean"] == pytest.approx(sum(values) / 2)
    text = (suite / "summary.md").read_text()
    assert "seeds: 0, 1 (mean ± standard deviation)" in text and "Task negation" in text


@pytest.mark.slow
def test_run_again_it_skips_everything(
    root: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    files = list((root / "results").rglob("*accuracies.json"))
    before = {path: path.stat().st_mtime_ns for path in files}
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert reproduce.main(["--seeds=2", *several(root)]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 2 * 14
    assert caplog.text.count("done before, skipped") == 2 * 2 * len(TASKS)
    assert "Single-task accuracy" in out and "results:" in out


@pytest.mark.slow
def test_chosen_modes_alone_are_run_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ["--modes=linear+taujp", "--others-batch-size=8", *flags(tmp_path)]
    with small_suite(monkeypatch):
        assert reproduce.main(words) == 0
        assert reproduce.main([*words[1:], "--modes=linear,linear+taujp"]) == 0
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 5  # zero-shot, and four stages of linear+taujp
    suite = tmp_path / "results" / "embedded"
    summary = json.loads((suite / "summary.json").read_text())
    assert list(summary["single"]) == ["none", "linear", "linear+taujp"]
    page = (suite / "ViT-Nano-8" / "report.html").read_text(encoding="utf-8")
    assert "explorer-data" in page and "standard</th>" not in page
    assert "interference, on at most 64 test images of each task:" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=1"], "use --seeds=N"),
        (["--finetuning-mode=linear"], "no --finetuning-mode here"),
        (["--seeds=0"], "at least 1, got 0"),
        (["--objective=taujp"], "such as --modes=linear,linear+taujp"),
        (["--modes=liner"], "unknown fine-tuning mode 'liner'; choose from linear"),
        (["--modes=linear,none"], "--modes=none has no task vectors"),
        (["--modes=standard+taujp"], "choose --finetuning-mode=linear"),
        (["--modes=,"], "--modes names nothing"),
        (["--seeds=2", "--save=x"], "--save names one run's folder"),
        (["--suite=nothing"], "unknown suite 'nothing'"),
        (["--tasks=MNITS"], "'MNITS'; choose from MNIST, "),
        (["--modle=x"], "unknown flag '--modle'; choose from --model, "),
    ],
)
def test_bad_flags(argv: list[str], message: str, capsys: Capture) -> None:
    try:
        code: object = reproduce.main(argv)
    except SystemExit as error:  # of the parser
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written_stop_it_before_the_first_stage(
    worked: list[str], tmp_path: Path, capsys: Capture
) -> None:
    summary = tmp_path / "results" / "embedded" / "summary.json"
    summary.mkdir(parents=True)
    assert reproduce.main([f"--save={tmp_path}/run", f"--results={tmp_path}/results"]) == 2
    assert f"cannot write {summary}: it exists and is not a file" in capsys.readouterr().err
    assert not worked


def test_spread_is_mean_and_standard_deviation() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert spread([0.5, None]) == "-"


def test_seed_zero_is_the_run_without_a_seed() -> None:
    run = Run.of(small_config(Path("x")))
    assert with_seed(run, 0).config.seed is None and with_seed(run, 2).seed == 2
    assert run.config.seed is None


@pytest.mark.slow
def test_a_paper_in_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = ["--paper=tangent", "--grid-points=3", "--pairs=Emoji+FashionMNIST"]
    words += ["--kernel-images=4", "--kernel-directions=4"]
    with small_suite(monkeypatch):
        assert reproduce.main([*flags(tmp_path), *words]) == 0
        told = capsys.readouterr().out
        assert "needs the data sets Emoji, FashionMNIST, Shapes" in told and "on two cores" in told
        folder = tmp_path / "results/embedded/papers/ViT-Nano-8/tangent"
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "no table" not in text and text.count("one seed") + text.count("cannot") >= 7
        for name in ("figure_2.pdf", "figure_3.pdf", "section_6.svg", "table_2.tex", "claims.tex"):
            assert (folder / name).is_file()
        modes = set(pd.read_csv(folder / "figure_3.csv")["mode"])
        assert modes == {"standard", "posthoc", "linear"}
        found = pd.read_csv(table_path(Run.of(parse_arguments(flags(tmp_path))), "negation_random"))
        assert "ascent, whole" in set(found["vector"])
        assert reproduce.main([*flags(tmp_path), *words]) == 0
    assert capsys.readouterr().out.count("done before, skipped") >= 12


def test_quick_is_one_seed(capsys: Capture) -> None:
    assert reproduce.main(["--quick", "--seeds=2"]) == 2
    assert "--quick is one seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paper=arithmetic", "--analogies=Emoji+Letters-Digits=StreetDigits"], "no Digits"),
        (["--paper=tangent", "--pairs=Emoji+Digits"], "no Digits"),
    ],
)
def test_what_a_paper_lacks_stops_it_before_the_work(
    words: list[str],
    message: str,
    worked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    dataset = SuiteData.dataset

    def missing(self: SuiteData, name: str) -> ImageDataset:
        if name == "Digits":
            raise UsageError("no Digits")
        return dataset(self, name)

    monkeypatch.setattr(SuiteData, "dataset", missing)
    monkeypatch.chdir(tmp_path)
    assert reproduce.main([*words, "--tasks=Emoji", f"--results={tmp_path}/results"]) == 2
    assert message in capsys.readouterr().err and not worked


def test_an_unknown_paper_is_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["--paper=tangents"])
    assert "arithmetic" in capsys.readouterr().err
