from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tangent_arithmetic.run import tracking
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run
from tangent_arithmetic.runtime import logs
from tangent_arithmetic.runtime.errors import UsageError
from tests.processes import wait_for


@pytest.fixture
def levels() -> Iterator[None]:
    """Restores the levels that `setup_logging` sets."""
    kept = {name: logging.getLogger(name).level for name in ("tangent_arithmetic", "__main__")}
    yield
    for name, level in kept.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(("first", "level"), [(True, logging.INFO), (False, logging.WARNING)])
@pytest.mark.usefixtures("levels")
def test_ranks_above_0_log_warnings_only(
    first: bool, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.ddp.is_main_process", lambda: first)
    logs.setup_logging()
    assert logging.getLogger("tangent_arithmetic.training.loop").getEffectiveLevel() == level
    assert logging.getLogger("__main__").getEffectiveLevel() == level


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "first", "shown"),
    [(io.StringIO, True, False), (Terminal, True, True), (Terminal, False, False)],
    ids=["file", "terminal", "terminal of another rank"],
)
def test_progress_yields_everything_and_shows_a_bar_on_a_terminal(
    stream: type[io.StringIO], first: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.ddp.is_main_process", lambda: first)
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    handlers = logging.getLogger().handlers[:]
    assert list(logs.progress(iter("abc"), "reading", total=3)) == ["a", "b", "c"]
    assert ("reading" in stderr.getvalue()) is shown
    assert bool(stderr.getvalue()) is shown
    assert logging.getLogger().handlers == handlers


class Clock:
    """A clock that goes on by some seconds each time it is read for an item."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize("first", [True, False])
def test_without_a_terminal_progress_is_a_line_each_quarter_of_a_minute(
    first: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tangent_arithmetic.runtime.ddp.is_main_process", lambda: first)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = Clock(monkeypatch)
    bar = logs.Progress(range(20, 100), "MNIST linear", done=20, unit="step")
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        for step in bar:
            clock.now += 1
            bar.note(64, loss=1 / (step + 1))
    if not first:
        assert caplog.messages == []
        return
    assert caplog.messages == [
        "MNIST linear: step 35 of 100, loss 0.029, 64 images/s, 65 s left",
        "MNIST linear: step 50 of 100, loss 0.020, 64 images/s, 50 s left",
        "MNIST linear: step 65 of 100, loss 0.015, 64 images/s, 35 s left",
        "MNIST linear: step 80 of 100, loss 0.013, 64 images/s, 20 s left",
        "MNIST linear: step 95 of 100, loss 0.011, 64 images/s, 5 s left",
    ]


def test_progress_of_unknown_length_tells_no_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = Clock(monkeypatch)
    with caplog.at_level(logging.INFO, logger="tangent_arithmetic"):
        for _ in logs.progress(iter("abcd"), "reading"):
            clock.now += 10
    assert caplog.messages == ["reading: batch 2", "reading: batch 4"]


def test_the_bar_of_a_terminal_shows_the_loss(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logs, "EVERY", 0)
    bar = logs.Progress(range(3), "MNIST linear", unit="step")
    for _ in bar:
        bar.note(64, loss=0.25)
    assert "loss 0.250" in terminal.getvalue() and "images/s" in terminal.getvalue()
    assert caplog.messages == []


def test_append_result_appends_a_line_if_a_database_is_set(tmp_path: Path) -> None:
    tracking.append_result(Run.of(SimpleNamespace(results_db=None)), {"step": 0})
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "new" / "all.jsonl"
    run = Run.of(SimpleNamespace(results_db=str(path)))
    tracking.append_result(run, {"step": 1})
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n'
    with path.open("a", encoding="utf-8") as file:
        file.write('{"ste')  # left by a killed run
    for step in (2, 3):
        tracking.append_result(run, {"step": step})
    expected = '{"step": 1}\n{"ste\n{"step": 2}\n{"step": 3}\n'
    assert path.read_text(encoding="utf-8") == expected


# --- W&B


def test_wandb_is_not_imported_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import raises ImportError
    with tracking.tracked(Run.of(Config()), "finetune") as run:
        run.log({"loss": 1.0}, step=1)
    with (
        pytest.raises(UsageError, match="--wandb needs the package wandb: pip install wandb"),
        tracking.tracked(Run.of(Config(wandb=True)), "finetune"),
    ):
        pass


def test_the_module_that_wandb_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("import surely_missing.part\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    message = "cannot be imported .*it needs surely_missing: pip install surely_missing"
    with (
        pytest.raises(UsageError, match=message),
        tracking.tracked(Run.of(Config(wandb=True)), "finetune"),
    ):
        pass


def test_pages_and_figures_go_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda values, step=None: logged.append(values), finish=lambda: None)
    module = SimpleNamespace(
        init=lambda **_: run,
        Html=lambda text, inject: ("page", text, inject),
        Image=lambda path: ("figure", path),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    page, figure = tmp_path / "report.html", tmp_path / "single.png"
    page.write_text("<p>é</p>", encoding="utf-8")
    figure.touch()
    with tracking.tracked(Run.of(Config(wandb=True)), "analysis") as tracker:
        tracker.show("report", page)
        tracker.show("figures/single", figure)
        tracker.show("figures/none", tmp_path / "none.png")
    assert logged == [
        {"report": ("page", "<p>é</p>", False)},
        {"figures/single": ("figure", str(figure))},
    ]


@pytest.mark.parametrize(
    ("exp_name", "group", "name"),
    [(None, "ViT-Nano-8", "finetune-MNIST"), ("trial", "trial", "trial-finetune-MNIST")],
)
def test_wandb_runs_are_named_and_finished_even_if_the_job_fails(
    exp_name: str | None, group: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"logged": [], "finished": False}

    def log(values: dict[str, float], step: int | None) -> None:
        seen["logged"].append((values, step))

    def finish(exit_code: int | None = None) -> None:
        seen["finished"] = True

    def init(**options: Any) -> SimpleNamespace:
        seen.update(options)
        return SimpleNamespace(log=log, finish=finish)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    args = Config(wandb=True, exp_name=exp_name, lr=0.5)
    with (
        pytest.raises(RuntimeError, match="the loss is nan"),
        tracking.tracked(Run.of(args), "finetune-MNIST") as run,
    ):
        run.log({"loss": 1.0}, step=1)
        raise RuntimeError("the loss is nan")
    assert (seen["group"], seen["name"]) == (group, name)
    assert seen["config"]["lr"] == 0.5
    assert seen["logged"] == [({"loss": 1.0}, 1)]
    assert seen["finished"]


@pytest.mark.slow
def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with tracking.tracked(Run.of(Config(wandb=True, exp_name="trial")), "finetune-MNIST") as run:
        run.log({"the_loss": 0.25}, step=1)
        page = tmp_path / "report.html"
        page.write_text("<p>a page</p>", encoding="utf-8")
        run.show("the_page", page)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    texts = (
        b"tangent-arithmetic",
        b"trial-finetune-MNIST",
        b"the_loss",
        b"n_eval_points",
        b"the_page",
    )
    wait_for(lambda: all(text in written.read_bytes() for text in texts), 120)  # W&B's own process
