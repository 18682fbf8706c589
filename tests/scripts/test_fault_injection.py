"""Faults on purpose: a short form of all of them, and a report that does not hide one."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "scripts"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, looks into /proc")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("fault_injection")


@pytest.fixture
def facts() -> dict[str, Any]:
    """The committed ones."""
    path = ROOT / "results" / "reliability" / "faults.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_page_shows_the_committed_figures(script: ModuleType, facts: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert script.table(facts) in page
    assert script.problems(facts) == []
    assert sum(run["hits"] for run in facts["kills"] + facts["ends"]) >= 1000
    assert facts["hostile"]["tried"] >= 100_000
    assert facts["provenance"].keys() == script.PARTS.keys()
    for origin in facts["provenance"].values():
        assert not origin["commit"].endswith("+changes")


BAD: list[tuple[tuple[str | int, ...], object]] = [
    (("kills", 0, "identical"), 0),
    (("kills", 1, "outlived"), 1),
    (("signals", 0, "leftovers"), 1),
    (("writes", 0, "intact"), 1),
    (("full_disk", "told"), 1),
    (("ends", 0, "leftovers"), 1),
    (("damaged", 0, "wrong"), 1),
    (("damaged", 2, "wrong"), 1),
    (("hostile", "beyond_bounds"), 1),
    (("hostile", "executed"), 1),
    (("hostile", "crashed"), 1),
    (("hostile", "other_errors"), 1),
    (("world_sizes", 0, "same_pictures"), False),
    (("world_sizes", 0, "worst_relative_distance"), 1e-4),
    (("world_sizes", 1, "worst_relative_distance"), 1e-11),
    (("world_sizes", 1, "worst_relative_distance"), float("nan")),
]


@pytest.mark.parametrize(("place", "value"), BAD)
def test_each_fault_is_a_problem(
    place: tuple[Any, ...], value: object, script: ModuleType, facts: dict[str, Any]
) -> None:
    bad = copy.deepcopy(facts)
    inside = bad
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    assert len(script.problems(bad)) == 1


@pytest.mark.slow
def test_a_short_form_of_all_faults() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "fault_injection.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
