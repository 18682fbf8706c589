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

def spend(path):
    bytearray(200 << 20).find(b"1")

def spin(path):
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass

def escape(path):
    (path.parent / "else").touch()

hostile_files.SECONDS = 1
hostile_files.SPARE_SECONDS = 0.2
hostile_files.READERS[:] = [vars()[sys.argv.pop(1)]]
raise SystemExit(hostile_files.main(sys.argv[1:]))
"""


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    environment = {"PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def counts(count: int, folder: Path, *words: str) -> dict[str, int]:
    """How many files had which outcome; a trace, a crash or one beyond its bounds is a failure."""
    done = run(str(SCRIPTS / "hostile_files.py"), f"--count={count}", *words, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, int] = json.loads(done.stdout)["counts"]
    return found


def test_a_sample_of_hostile_files(tmp_path: Path) -> None:
    found = counts(1000, tmp_path)
    assert sum(found.values()) == 1000
    assert set(found) == {"read", "refused"} and found["refused"] > 700


def test_a_sample_of_each_family(tmp_path: Path) -> None:
    found = counts(120, tmp_path, "--share=1", "--jobs=2")
    assert sum(found.values()) == 120 and set(found) == {"read", "refused"}


@pytest.mark.slow
def test_a_thousand_files_that_are_hostile_by_design(tmp_path: Path) -> None:
    found = counts(1000, tmp_path, "--share=1", "--jobs=2")
    assert sum(found.values()) == 1000 and set(found) == {"read", "refused"}


@pytest.mark.slow
def test_ten_thousand_hostile_files(tmp_path: Path) -> None:
    found = counts(10_000, tmp_path)
    assert sum(found.values()) == 10_000
    assert set(found) == {"read", "refused"} and found["refused"] > 7000


@pytest.mark.parametrize(
    ("reader", "count", "outcome"),
    [
        ("trust", 100, "executed"),
        ("hang", 12, "crashed"),
        ("grow", 30, "other error"),
        ("spend", 3, "beyond bounds"),
        ("spin", 3, "beyond bounds"),
        ("escape", 3, "executed"),
    ],
)
def test_the_watch_sees_what_it_watches_for(
    reader: str, count: int, outcome: str, tmp_path: Path
) -> None:
    done = run("-c", TRUSTING, reader, f"--count={count}", folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["counts"][outcome] > 0 and report["problems"]
    if count == 3:
        assert report["counts"] == {outcome: 3}


def test_the_same_files_are_read_by_any_number_of_processes(tmp_path: Path) -> None:
    assert counts(60, tmp_path) == counts(60, tmp_path, "--jobs=3")


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
