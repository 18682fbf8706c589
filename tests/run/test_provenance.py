from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tangent_arithmetic.run import provenance
from tangent_arithmetic.run.args import Config
from tangent_arithmetic.run.run import Run

THETA0 = "a" * 64


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["some/folder/eval_single_task.py", "--seed=3"])
    found = provenance.provenance(Run.of(Config(seed=3, device="cpu")), 1.26, theta0_hash=THETA0)
    assert json.loads(json.dumps(found)) == found
    assert found["argv"] == ["eval_single_task.py", "--seed=3"]
    assert found["config"]["n_eval_points"] == 21
    assert found["source"] == str(Path("src", "tangent_arithmetic", "__init__.py"))
    assert found["versions"].keys() == {"python", *provenance.PACKAGES}
    expected: dict[str, Any] = {
        "model": "ViT-Nano-8",
        "suite": "embedded",
        "seed": 3,
        "device": "cpu",
    }
    expected |= {"world_size": 1, "seconds": 1.3, "theta0_hash": THETA0}
    assert {name: found[name] for name in expected} == expected


def test_there_is_no_commit_outside_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.git_commit() is None
