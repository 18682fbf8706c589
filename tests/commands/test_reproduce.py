from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tangent_arithmetic.run.run import Run
from tangent_arithmetic.run.summary import spread, with_seed
from tests.small_suite import TASKS, flags, small_config, small_suite

ROOT = Path(__file__).resolve().parent.parent.parent


def script(name: str) -> ModuleType:
    """A script, or the command of the package that it is a face of."""
    command = f"tangent_arithmetic.commands.{name}"
    if importlib.util.find_spec(command) is not None:
        return importlib.import_module(command)
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    return script("reproduce")


@pytest.fixture(scope="module")
def root(reproduce: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the whole benchmark done, for two seeds."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        monkeypatch.chdir(folder)
        assert reproduce.main(["--seeds=2", *several(folder)]) == 0
        yield folder


def several(folder: Path) -> list[str]:
    """Flags for runs of several seeds, each in a folder of its own."""
    return [flag for flag in flags(folder) if not flag.startswith("--save")]


def test_every_file_of_the_design_is_there(root: Path) -> None:
    suffix = "+".join(TASKS)
    names = ["zeroshot_accuracies", "report"]
    for prefix in ("", "linear_", "posthoc_"):
        names += [f"{prefix}ft_accuracies", f"{prefix}additions-{suffix}", f"{prefix}negations"]
    suite = root / "results" / "embedded"
    for run in ("ViT-Nano-8", "ViT-Nano-8_seed1"):
        assert {path.stem for path in (suite / run).iterdir()} == set(names)
        page = (suite / run / "report.html").read_text(encoding="utf-8")
        assert "explorer-data" in page and "Task negation" in page
    assert (root / "checkpoints" / "ViT-Nano-8" / "EmojiVal" / "finetuned.safetensors").is_file()
    assert (root / "checkpoints_1" / "ViT-Nano-8" / "zeroshot.safetensors").is_file()


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


def test_the_figure_is_a_picture(root: Path) -> None:
    with Image.open(root / "results" / "embedded" / "figures" / "overview.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert picture.width > 1000 and colours is not None and len(colours) > 50


def test_run_again_it_skips_everything_and_says_so(
    reproduce: ModuleType,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = [p for p in (root / "results").rglob("*accuracies.json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    with caplog.at_level("INFO", logger="tangent_arithmetic"):
        assert reproduce.main(["--seeds=2", *several(root)]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    out = capsys.readouterr().out
    assert out.count("done before, skipped") == 2 * 11
    assert caplog.text.count("done before, skipped") == 2 * 2 * len(TASKS)
    assert "Single-task accuracy" in out and "results:" in out


def test_results_that_came_with_a_clone_do_not_count(reproduce: ModuleType, root: Path) -> None:
    run = Run.of(small_config(root)).with_(save=str(root / "checkpoints" / "ViT-Nano-8"))
    first = reproduce.stages(run, several(root))[0]
    ledger = reproduce.Ledger(run)
    assert ledger.is_done(first)
    first.output.write_text(first.output.read_text() + " ")
    assert not ledger.is_done(first)
    first.output.write_text(first.output.read_text()[:-1])
    kept = ledger.path.read_bytes()
    for damage in (None, b"", b"[]", kept[:-9], b"\xff"):
        ledger.path.unlink() if damage is None else ledger.path.write_bytes(damage)
        assert not ledger.is_done(first)
    ledger.path.write_bytes(kept)
    assert ledger.is_done(first)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=1"], "use --seeds=N"),
        (["--finetuning-mode=linear"], "no --finetuning-mode here"),
        (["--seeds=0"], "at least 1, got 0"),
        (["--seeds=2", "--save=x"], "--save names one run's folder"),
        (["--suite=nothing"], "unknown suite 'nothing'"),
    ],
)
def test_wrong_flags(
    reproduce: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = reproduce.main(argv)
    except SystemExit as error:  # of the parser
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written_stop_it_before_the_first_stage(
    reproduce: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reproduce, "run_stages", lambda *_: pytest.fail("worked"))
    summary = tmp_path / "results" / "embedded" / "summary.json"
    summary.mkdir(parents=True)
    assert reproduce.main([f"--save={tmp_path}/run", f"--results={tmp_path}/results"]) == 2
    assert f"cannot write {summary}: it exists and is not a file" in capsys.readouterr().err


def test_spread() -> None:
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"


def test_seed_zero_is_the_run_without_a_seed() -> None:
    args = small_config(Path("x"))
    assert (
        with_seed(Run.of(args), 0).config.seed is None
        and with_seed(Run.of(args), 2).seed == 2
        and args.seed is None
    )
