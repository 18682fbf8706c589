from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tangent_arithmetic.commands import prepare_data
from tangent_arithmetic.data.prepare.facts import SETS
from tangent_arithmetic.data.suites import SUITES
from tests.archives import Server, publish, put, serving
from tests.miniatures import picture

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: Patch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as started:
        yield started


def test_sets_are_fetched_arranged_and_verified(
    tmp_path: Path,
    server: Server,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("MNIST", "DTD"):
        server.files |= publish(name, tmp_path / name, monkeypatch, server.url)
    root, report = tmp_path / "data", tmp_path / "report.json"
    argv = [f"--data-location={root}", "--datasets=MNIST,DTD", f"--report={report}"]
    assert prepare_data.main([*argv, "--check"]) == 1
    assert not root.exists() and not server.requests
    out = capsys.readouterr().out
    assert "MNIST: missing" in out and "| DTD      | ? of 48 |" in out
    with caplog.at_level("INFO"):
        assert prepare_data.main(argv) == 0
    assert f"DTD: downloading {server.url}dtd-r1.0.1.tar.gz" in caplog.text
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:]]
    assert cells == [
        ["MNIST", "4", "-", "2", "0", "0", "good"],
        ["DTD", "48", "-", "48", "0", "0", "good"],
    ]
    asked = len(server.requests)
    with caplog.at_level("INFO"):
        assert prepare_data.main(argv) == 0
    assert "MNIST: already complete, skipped" in caplog.text and len(server.requests) == asked
    assert prepare_data.main([*argv, "--check"]) == 0
    facts = json.loads(report.read_text())["datasets"]
    assert [(one["name"], one["verdict"], one["found"]) for one in facts] == [
        ("MNIST", "good", {"train": 4, "test": 2}),
        ("DTD", "good", {"train": 48, "test": 48}),
    ]


def test_a_failing_set_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("Cars", tmp_path / "Cars", monkeypatch)
    put(publish("SVHN", tmp_path / "SVHN", monkeypatch), tmp_path / "data" / "downloads")
    argv = [f"--data-location={tmp_path / 'data'}", "--datasets=Cars,SVHN"]
    assert prepare_data.main(argv) == 1
    out = capsys.readouterr().out
    assert "error: data set Cars: car_devkit.tgz is missing." in out
    assert "kaggle.com/datasets/jessicali9530/stanford-cars-dataset" in out
    assert f"Put the file into {tmp_path / 'data' / 'downloads'} and run again" in out
    rows = [line.split("|") for line in out.splitlines() if line.startswith("|")]
    assert [row[-2].strip() for row in rows[2:]] == ["missing", "good"]


def test_a_leak_exits_with_1_and_names_both_paths(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish("DTD", tmp_path, monkeypatch)
    argv = [f"--data-location={tmp_path}", "--datasets=DTD", "--check"]
    assert prepare_data.main(argv) == 0
    train, test = tmp_path / "dtd" / "train", tmp_path / "dtd" / "val"
    for i, name in enumerate(sorted(folder.name for folder in train.iterdir())[:15]):
        picture(train / name / "new.jpg", 100 + 5 * i)
        picture(test / name / "another_name.jpg", 100 + 5 * i)
    assert prepare_data.main(argv) == 1
    out = capsys.readouterr().out
    assert "banded/new.jpg and dtd/val/banded/another_name.jpg are the same image in two" in out
    assert "test: expected 48 images" in out
    assert "more; --report=FILE writes all" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--datasets=MNSIT"], "unknown data set 'MNSIT'; choose from MNIST"),
        (["--suite=nothing"], "unknown suite 'nothing'"),
        (["--suite=embedded"], "--suite=embedded needs no data"),
    ],
)
def test_invalid_flags_exit_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_default_is_the_whole_suite() -> None:
    assert prepare_data.chosen("clip8", None) == [*SUITES["clip8"].tasks, "ImageNet"]
    assert prepare_data.chosen("clip8", "STL10,MNIST,STL10") == ["STL10", "MNIST"]
    assert prepare_data.chosen("clip14", None) == [*SUITES["clip14"].tasks, "ImageNet"]
    named = {"EMNISTLetters", "TinyImageNet"}
    assert {*prepare_data.chosen("clip20", None), *named} == set(SETS)


def test_help_is_free_of_torch_and_the_script_starts(tmp_path: Path) -> None:
    report = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules))"
    start = "from scripts.prepare_data import main; raise SystemExit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", f"{report}; {start}", "--help"]
    env = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    assert "--data-location" in done.stdout and "RESISC45" in done.stdout
    assert done.stdout.endswith("False\n")
