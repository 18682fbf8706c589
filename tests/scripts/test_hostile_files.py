"""Thousands of damaged and hostile files: errors only; and the watch notices what it is for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory, forks")

# the script, with readers that trust what they read
TRUSTING = """
import pickle, sys, time
import hostile_files, torch

def trust(path):
    if path.suffix != ".pt":
        return
    with path.open("rb") as file:
        pickle.load(file)

def hang(path):
    if path.suffix == ".safetensors":
        time.sleep(3)  # longer than SECONDS below

def grow(path):
    if path.suffix == ".safetensors":
        torch.ones(1 << 30)

hostile_files.SECONDS = 1
hostile_files.READERS[:] = [vars()[sys.argv.pop(1)]]
raise SystemExit(hostile_files.main(sys.argv[1:]))
"""


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    environment = {"PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def counts(count: int, folder: Path) -> dict[str, int]:
    done = run(str(SCRIPTS / "hostile_files.py"), f"--count={count}", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, int] = json.loads(done.stdout)["counts"]
    return found


def test_a_sample_of_hostile_files(tmp_path: Path) -> None:
    found = counts(1000, tmp_path)
    assert sum(found.values()) == 1000
    assert set(found) == {"read", "refused"} and found["refused"] > 700


@pytest.mark.slow
def test_ten_thousand_hostile_files(tmp_path: Path) -> None:
    found = counts(10_000, tmp_path)
    assert sum(found.values()) == 10_000
    assert set(found) == {"read", "refused"} and found["refused"] > 7000


@pytest.mark.parametrize(
    ("reader", "count", "outcome"),
    [("trust", 100, "executed"), ("hang", 12, "crashed"), ("grow", 30, "other error")],
)
def test_the_watch_sees_what_it_watches_for(
    reader: str, count: int, outcome: str, tmp_path: Path
) -> None:
    done = run("-c", TRUSTING, reader, f"--count={count}", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["counts"][outcome] > 0 and report["problems"]


def test_a_file_can_be_made_again(tmp_path: Path) -> None:
    for _ in range(2):
        done = run(str(SCRIPTS / "hostile_files.py"), "--only=7", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        (tmp_path / "hostile_7").rename(tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
    first, second = (
        [p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()]
        for folder in sorted(tmp_path.iterdir())
    )
    assert first == second
