"""Features that are computed ahead are those that single tasks, sums, negations and pages read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tangent_arithmetic.arithmetic import features
from tangent_arithmetic.commands import add, analyze, evaluate, negate
from tangent_arithmetic.report import ahead
from tangent_arithmetic.run.run import Run
from tests.small_suite import TASKS

Passes = list[tuple[str, int]]  # of each pass over a split, its name and number of vectors


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    compute: Callable[..., Any] = features._compute
    found: Passes = []

    def counted(encoder: Any, vectors: Any, batches: Any, settings: Any) -> Any:
        found.append((batches.name, len(vectors)))
        return compute(encoder, vectors, batches, settings)

    monkeypatch.setattr(features, "_compute", counted)
    return found


def results(folder: Path) -> dict[str, float | None]:
    """All numbers in the results of a folder, without provenance, by file and keys."""
    found: dict[str, float | None] = {}

    def note(value: Any, place: str) -> None:
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in items:
                if key != "provenance":
                    note(part, f"{place}/{key}")
        else:
            found[place] = value

    for path in folder.glob("*.json"):
        note(json.loads(path.read_text()), path.name)
    return found


def splits(control: int, task: int, run: Run) -> dict[str, int]:
    """By split, the number of vectors of a pass over it."""
    counts = {**dict.fromkeys(TASKS, task), run.control: control}
    return {f"{name}{end}": count for name, count in counts.items() for end in ("Val", "")}


@pytest.mark.parametrize("mode", ["linear", "posthoc"])
def test_later_commands_compute_nothing(
    own: Run, words: list[str], mode: str, passes: Passes, tmp_path: Path
) -> None:
    before = results(own.results)
    argv = [*words, f"--finetuning-mode={mode}", f"--cache-dir={tmp_path / 'cache'}"]
    assert evaluate.main([*argv, "--ahead=sums"]) == 0
    count = len(TASKS)
    assert dict(passes) == splits(count, 2, own) and len(passes) == 2 * (count + 1)
    passes.clear()
    assert add.main(argv) == negate.main(argv) == 0
    assert passes == [(task, count - 1) for task in TASKS]  # interference, on a few images
    after = results(own.results)
    assert len(after) > 100 and after == pytest.approx(before, abs=1e-5)


def test_the_page_computes_nothing_either(
    own: Run, words: list[str], passes: Passes, tmp_path: Path
) -> None:
    argv = [*words, "--finetuning-mode=linear", f"--cache-dir={tmp_path / 'cache'}"]
    assert evaluate.main([*argv, "--ahead=page"]) == 0
    count = len(TASKS)
    assert dict(passes) == splits(count, count, own)
    passes.clear()
    assert analyze.main(["report", *argv]) == 0
    assert passes == []


def test_a_page_with_a_sample_is_left_to_itself(
    own: Run, words: list[str], passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "sample_size", lambda *_: 5)
    argv = [*words, "--finetuning-mode=linear", f"--cache-dir={tmp_path / 'cache'}"]
    assert evaluate.main([*argv, "--ahead=page"]) == 0
    assert dict(passes) == splits(len(TASKS), 2, own)


@pytest.mark.parametrize("more", [["--finetuning-mode=standard"], ["--no-feature-cache"]])
def test_nothing_is_computed_ahead_in_vain(
    own: Run, words: list[str], more: list[str], passes: Passes, tmp_path: Path
) -> None:
    argv = [*words, "--finetuning-mode=linear", f"--cache-dir={tmp_path / 'cache'}", *more]
    assert evaluate.main([*argv, "--ahead=page"]) == 0
    assert all(count <= 1 for _, count in passes)
