"""The scripts in examples/ run as they are, in seconds, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def output(name: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert [*folder.iterdir()] == []  # nothing is left behind
    return done.stdout


def shares(line: str) -> list[float]:
    return [float(value) for value in re.findall(r"([\d.]+) %", line)]


@pytest.mark.slow
def test_linearize(tmp_path: Path) -> None:
    text = output("linearize", tmp_path)
    start, linear, standard = map(float, re.findall(r"by (\d\S*)$", text, flags=re.MULTILINE))
    assert start == 0 and linear < 1e-5 < standard


@pytest.mark.slow
def test_add_and_negate(tmp_path: Path) -> None:
    lines = dict(
        re.findall(r"^(\w.*?)  +(A .*)$", output("add_and_negate", tmp_path), re.MULTILINE)
    )
    start = shares(lines["start"])
    for mode in ("standard", "linear"):
        assert all(
            new > old + 10 for new, old in zip(shares(lines[f"{mode} A+B"]), start, strict=True)
        )
        forgotten, kept = shares(lines[f"{mode} -A"])
        assert forgotten < start[0] - 10 and abs(kept - start[1]) < 10


@pytest.mark.slow
def test_merge_files(tmp_path: Path) -> None:
    assert re.search(r"moved the weights by [1-9]", output("merge_files", tmp_path))


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    text = output("sweep", tmp_path)
    values = dict(re.findall(r"^(\d\.\d) +([\d.]+) %", text, re.MULTILINE))
    (best,) = re.findall(r"^(\d\.\d) .*best", text, re.MULTILINE)
    assert len(values) == 16 and best != "0.0"
    assert float(values[best]) == max(map(float, values.values())) > float(values["0.0"]) + 10


@pytest.mark.slow
def test_own_images(tmp_path: Path) -> None:
    text = output("own_images", tmp_path)
    before, after = shares(text)[-2:]
    assert after > before


def test_each_is_in_the_list_and_short() -> None:
    listed = set(re.findall(r"\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    scripts = [*EXAMPLES.glob("*.py")]
    assert listed == {path.name for path in scripts} and len(scripts) == 5
    for path in scripts:
        assert len(path.read_text().splitlines()) <= 70, path
