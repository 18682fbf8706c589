"""Damaged and hostile files end in errors only, and the script notices what it watches for."""

from __future__ import annotations

import importlib
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits memory, forks"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded"),  # of Python 3.12, where it forks
]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("hostile_files")


@pytest.fixture(scope="module")
def seeds(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with torch.random.fork_rng():
        paths: list[Path] = script.write_seeds(tmp_path_factory.mktemp("hostile") / "seeds")
    return paths


@pytest.mark.parametrize(
    ("count", "share", "refused"),
    [
        (200, 0.0, 140),
        (30, 1.0, 20),
        pytest.param(10_000, 0.06, 7000, marks=pytest.mark.slow),
        pytest.param(1000, 1.0, 700, marks=pytest.mark.slow),
    ],
)
def test_every_file_is_read_or_refused(
    count: int, share: float, refused: int, script: ModuleType, seeds: list[Path]
) -> None:
    outcome = script.read_all(range(count), seeds, jobs=2, share=share)
    assert not outcome.problems
    assert sum(outcome.counts.values()) == count and set(outcome.counts) <= {"read", "refused"}
    assert outcome.counts["refused"] > refused


def trust(path: Path) -> None:
    if path.suffix == ".pt":
        with path.open("rb") as file:
            pickle.load(file)


def hang(path: Path) -> None:
    if path.suffix == ".safetensors":
        time.sleep(3)


def grow(path: Path) -> None:
    torch.ones(1 << 30)


def spend(path: Path) -> None:
    bytearray(200 << 20).find(b"1")


def spin(path: Path) -> None:
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass


def escape(path: Path) -> None:
    (path.parent / "else").touch()


@pytest.mark.parametrize(
    ("reader", "count", "outcome"),
    [
        (trust, 60, "executed"),
        (hang, 6, "crashed"),
        (grow, 1, "other error"),
        (spend, 1, "beyond bounds"),
        (spin, 1, "beyond bounds"),
        (escape, 1, "executed"),
    ],
)
def test_files_that_do_harm_are_reported(
    reader: object,
    count: int,
    outcome: str,
    script: ModuleType,
    seeds: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "READERS", [reader])
    monkeypatch.setattr(script, "SECONDS", 1 if reader is hang else 30)
    monkeypatch.setattr(script, "SPARE_SECONDS", 0.2)
    found = script.read_all(range(count), seeds, share=0.0)
    assert found.counts[outcome] > 0 and found.problems
    assert sum(found.counts.values()) == count


def test_a_file_can_be_written_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    contents = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        assert script.main(["--only=1"]) == 0
        written = (p for p in sorted((tmp_path / folder / "hostile_1").rglob("*")) if p.is_file())
        contents.append([path.read_bytes() for path in written])
    assert contents[0] == contents[1] != []


def test_the_command_reports_its_counts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert script.main(["--count=3"]) == 0
    assert '"problems": []' in capsys.readouterr().out
